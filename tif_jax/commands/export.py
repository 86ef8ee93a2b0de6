"""A model as StableHLO, as ONNX or for timm, with a manifest and a loader that needs no tif_jax."""

from pathlib import Path

from tif_jax.commands import _arguments
from tif_jax.commands._reducers import entry_in
from tif_jax.errors import InputError
from tif_jax.export import FORMATS
from tif_jax.export.ladder import check_form, write_ladder
from tif_jax.runtime import files
from tif_jax.weights.ladder import load_ladder
from tif_jax.weights.loading import load_with_fields


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif export", description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="what a run left; or a folder in it, as DIR/backbone")
    source.add_argument("--weights", metavar="FILE", help="a weight file (.safetensors, .npz, .pth) or a checkpoint")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "--reducer",
        metavar="NAME[:OPTION=VALUE...]|FILE.json",
        help="another than the model's own, as in tome:num_merged=8, or a file of `tif calibrate`",
    )
    parser.add_argument("--ladder", metavar="FILE", help="of `tif ladder`: several models, and when the next is asked")
    parser.add_argument(
        "--dtype", default="float32", help="to compute in: float32 (default) or, as StableHLO, bfloat16"
    )
    parser.add_argument("--output", metavar="DIR", help="a new folder (default with --workdir: WORKDIR/export/FORMAT)")
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    output = _output(arguments.output, arguments.workdir, arguments.to)
    entry = None if arguments.reducer is None else entry_in(arguments.reducer)
    other = {} if entry is None else {"reducer": entry.name, **entry.arguments}
    weights = arguments.weights if arguments.workdir is None else arguments.workdir
    to_form = FORMATS[arguments.to]
    if arguments.ladder is not None:
        _arguments.check_ladder_alone(arguments)
        check_form(arguments.to)
        adaptive = load_ladder(weights, arguments.ladder, dtype=arguments.dtype)
        rungs = write_ladder(adaptive, output, arguments.to, to_form)["ladder"]
        print(f"{output}: a ladder of {', '.join(format(rung['gmac'], '.3g') for rung in rungs)} GMAC")
        return
    model, _ = load_with_fields(weights, dtype=arguments.dtype, fresh_told_at=None, **other)
    manifest = to_form(model, output)
    print(f"{output / manifest['model']}: {manifest['reducer']['name']}, {manifest['cost']['gmac']:.3g} GMAC")


def _output(given: str | None, workdir: str | None, form: str) -> Path:
    """The folder to make. Raises InputError where there is something already."""
    if given is None and workdir is None:
        raise InputError("--output is missing: with --weights, say which folder is to be made")
    output = Path(given if given is not None else Path(str(workdir)) / "export" / form).expanduser()
    files.check_new(output)
    return output
