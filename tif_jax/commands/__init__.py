"""The programs of `tif`, one module each."""
