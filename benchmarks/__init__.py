"""Programs that print the tables of docs/results.md: `python -m benchmarks.NAME` from the repository's root."""
