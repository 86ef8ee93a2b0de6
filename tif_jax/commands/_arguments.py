"""What every command's line has in common."""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from tif_jax.commands._parser import Parser
from tif_jax.data import remote
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.runtime import log_file, workdir


def parse(command: str, description: str, argv: list[str], **flags: dict) -> argparse.Namespace:
    """Namespace of config (an `Experiment`), workdir (an existing folder that can be written) and the command's own flags.

    flags: name -> keyword arguments of argparse's add_argument. Raises InputError for anything amiss.
    """
    parser = Parser(prog=f"tif {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE[:ARG]",
        help="--config.KEY=VALUE overrides a value of it; `tif help config` lists names and keys",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where results go and earlier ones are")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    arguments, rest = parser.parse_known_args(argv)
    if stray := [a for a in rest if a.startswith("-") and not a.startswith(("--config.", "--noconfig."))]:
        raise InputError(f"unknown flag {stray[0]}; `tif {command} --help` lists the flags")
    log_to_stderr()  # reading the config may warn
    arguments.workdir = _folder("--workdir", arguments.workdir)
    arguments.config = config_file.load(os.path.expanduser(arguments.config), rest)
    _make_writable(arguments.workdir)
    return arguments


def at_least_1(flag: str, number: int) -> int:
    """The number. Raises InputError for less."""
    if number < 1:
        raise InputError(f"{flag} is {number}; it is at least 1")
    return number


def check_ladder_alone(arguments: argparse.Namespace) -> None:
    """Raises InputError where a ladder and a reducer are given."""
    if arguments.ladder is not None and arguments.reducer is not None:
        raise InputError("--ladder and --reducer are given; a ladder says its reducers itself")


def _folder(flag: str, name: str) -> Path:
    """The folder that is meant. Raises InputError where it can be none, before any work is done."""
    if not name:
        raise InputError(f"{flag} is empty; give a folder ('.' for this one)")
    if remote.is_url(name):
        raise InputError(f"{flag} is {name}, but results are written to folders; {remote.LOCALLY}")
    path = Path(os.path.expanduser(name))
    workdir.check_name(path)
    return path


def writable_folder(flag: str, name: str) -> Path:
    """The folder, made if need be. Raises InputError where nothing can be written."""
    path = _folder(flag, name)
    _make_writable(path, "folder")
    return path


def _make_writable(folder: Path, what: str = "workdir") -> None:
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may be probing too
    except OSError as error:
        raise InputError(f"{what} {folder} can not be written ({error.strerror}); choose another") from None


def add_weights_and_images(parser: argparse.ArgumentParser) -> None:
    """--weights and --images of commands that need no config."""
    whose = "a weight file, its folder, hf:OWNER/NAME, a checkpoint, a workdir"
    parser.add_argument("--weights", required=True, metavar="FILE", help=whose)
    folders = "folders of images, with those below them"
    parser.add_argument("--images", required=True, nargs="+", metavar="FOLDER", help=folders)


def batch_sizes(flag: str, text: str, otherwise: str = "") -> list[int]:
    """'1,16,256', ascending. otherwise: what else may be given, for the error."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 2**20 for part in parts):
        raise InputError(f"{flag} is {text!r}; it is as in 1,16,256{otherwise}")
    return sorted({int(part) for part in parts})


def log_to_stderr() -> None:
    """Our own messages, and only ours: Orbax tells a page per checkpoint, and hundreds of lines of a full disk."""
    logger = logging.getLogger("tif_jax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.addHandler(log_file.Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():  # for huggingface_hub, which is imported when it is needed
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata in files that can be read all the same
        _silence_abandoned_reads()


def _silence_abandoned_reads() -> None:
    """Of a damaged checkpoint Orbax raises the first error and gives up its other reads, whose threads tell pages."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    otherwise = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            otherwise(unraisable)

    sys.unraisablehook = hook
