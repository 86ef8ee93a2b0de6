"""Files behind URLs, such as gs://bucket/folder, through fsspec: of data, only TFDS folders of TFRecord files.

array_record files are read by a C++ library that knows files of the operating system alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tif_jax.errors import InputError, WorkError

LOCALLY = "mount the bucket (gcsfuse) or copy the folder to a disk (gcloud storage cp -r), and give that path"


def is_url(path: str | os.PathLike) -> bool:
    """Whether this is no path of the operating system."""
    return "://" in os.fspath(path)


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, made once per process, and the URL's name in it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no library for that protocol, or no such protocol
        raise InputError(
            f"can not read {url}: {error}; for gs:// `pip install 'tif_jax[gcs]'`, else {LOCALLY}"
        ) from None


@contextmanager
def failures(url: str) -> Iterator[None]:
    """Makes a WorkError of whatever network or owner have against reading a URL's files; paths are left alone."""
    try:
        yield
    except (InputError, WorkError, FileNotFoundError):
        raise
    except Exception as error:  # each file system has kinds of its own
        if not is_url(url):
            raise
        raise WorkError(
            f"can not read {url}: {' '.join(str(error).split()) or type(error).__name__}; check the URL, the network and "
            "the credentials (gcloud auth application-default login), then run the same command again"
        ) from error
