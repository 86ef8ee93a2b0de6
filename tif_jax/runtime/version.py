"""`__version__`: of this package, as it was installed."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("tif_jax")
except importlib.metadata.PackageNotFoundError:
    __version__ = "0+unknown"  # a source tree on PYTHONPATH, which nobody installed
