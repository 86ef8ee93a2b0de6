"""Warnings that are said once, however many stages of a run come upon their reason."""

import logging
from functools import cache


@cache
def warn(logger: logging.Logger, message: str) -> None:
    logger.warning("%s", message)
