"""What every long-running program needs: processes, signals, files, progress."""
