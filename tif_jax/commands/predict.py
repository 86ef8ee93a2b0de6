"""The likeliest classes of your pictures, or a depth or class for each pixel, by the model of a workdir or a weight file."""

import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

from tif_jax.commands import _arguments
from tif_jax.commands._maps import write_maps
from tif_jax.data import remote
from tif_jax.data.folder import as_id
from tif_jax.errors import InputError
from tif_jax.models.predictions import Prediction, pictures_of, predictions
from tif_jax.runtime import files
from tif_jax.runtime.progress import Progress
from tif_jax.tasks import CLASSIFICATION
from tif_jax.weights.loading import load

logger = logging.getLogger(__name__)

COLUMNS = ("file", "rank", "class", "name", "probability")


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif predict", description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="what a run left; or a folder in it, as DIR/backbone")
    source.add_argument(
        "--weights",
        metavar="FILE",
        help="a weight file (.safetensors, .npz, .pth), its folder, hf:OWNER/NAME, or a checkpoint",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="folders are searched with those below them")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes a picture (default: 5)")
    parser.add_argument(
        "--out", metavar="DIR", help="of a depth or segmentation model: where the maps of pixels go, as PNG files"
    )
    parser.add_argument("--csv", metavar="FILE", help=f"also write a table: {','.join(COLUMNS)}")
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    _arguments.at_least_1("--top", arguments.top)
    table = None if arguments.csv is None else _table_path(arguments.csv)
    pictures = pictures_of(arguments.images)
    model = load(arguments.weights if arguments.workdir is None else arguments.workdir)
    if model.task != CLASSIFICATION.name:
        if table:
            raise InputError(
                f"--csv is for classes of pictures, and this is a model of {model.task}: --out DIR has its maps"
            )
        write_maps(model, pictures, arguments.out)
        return
    if arguments.out is not None:
        raise InputError("--out is for models of depth or segmentation, and this is a classifier: leave it out")
    found = []
    with Progress("predict", len(pictures), "image") as progress:
        for prediction in predictions(model, pictures, arguments.top):
            found.append(prediction)
            progress.update(1)
    print(as_text(found, named=bool(model.class_names)))
    if table:
        files.write(table, as_csv(found).encode())
        logger.info("%s is written", table)
    if unread := sum(1 for prediction in found if prediction.error):
        logger.warning("%d of %d pictures could not be read", unread, len(found))


def as_text(found: Sequence[Prediction], named: bool) -> str:
    """A line per picture and one per class of it. named: whether the classes have names."""
    lines = []
    for prediction in found:
        lines.append(as_id(prediction.file) + (": could not be read" if prediction.error else ""))
        for name, probability in zip(prediction.names, prediction.probabilities, strict=True):
            lines.append(f"  {100 * probability:5.1f} %  {name if named else f'class {name}'}")
    return "\n".join(lines)


def as_csv(found: Sequence[Prediction]) -> str:
    """A row per picture and class, ranks from 1; a picture that could not be read has one row with its name alone."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for prediction in found:
        file = as_id(prediction.file)
        if prediction.error:
            table.writerow([file, "", "", "", ""])
        ranked = zip(prediction.classes, prediction.names, prediction.probabilities, strict=True)
        for rank, (output, name, probability) in enumerate(ranked, 1):
            table.writerow([file, rank, output, name, f"{probability:.9g}"])
    return text.getvalue()


def _table_path(name: str) -> Path:
    """Where the table goes. Raises InputError, before any work, where no file can be."""
    if not name or remote.is_url(name) or Path(name).expanduser().is_dir():
        raise InputError(f"--csv is {name!r}; it is the name of a file on this machine, as predictions.csv")
    path = Path(name).expanduser()
    files.check_writable(path.parent)
    if path.is_file() and path.stat().st_size:  # perhaps a picture: `--csv *.jpg`
        with path.open("rb") as opened:
            if not opened.readline(100).startswith(",".join(COLUMNS).encode()):
                raise InputError(f"--csv is {name!r}, a file that is no table of `tif predict`; choose another name")
    return path
