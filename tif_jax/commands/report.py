"""Print the report of a run anew, or a comparison of several, from their files; --output also writes it, with figures."""

import os
from pathlib import Path

from tif_jax.commands import _arguments, _comparison
from tif_jax.commands._report import TOKENS, markdown_of, write_markdown
from tif_jax.commands._results import result_of, summarise
from tif_jax.errors import InputError
from tif_jax.runtime import files, records
from tif_jax.tasks import of_metrics


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif report", description=__doc__, allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="the --workdir of a `tif run`, finished or not")
    parser.add_argument(
        "--output", metavar="FOLDER", help="write Markdown, JSON and figures there; by default nothing is"
    )
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    workdirs = [Path(os.path.expanduser(name)) for name in arguments.workdirs]
    output = None if arguments.output is None else _output(arguments.output, workdirs)
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise InputError("a folder is named twice; give each run once")
    if len(workdirs) > 1:
        found = _comparison.compare(workdirs)
        if output:
            _comparison.write(workdirs, found, output)
        print(_comparison.markdown_of(found))
        return
    result = result_of(workdirs[0])
    if output:
        output.mkdir(parents=True, exist_ok=True)
        if (pictures := workdirs[0] / TOKENS).exists():  # to draw them takes data and weights
            files.write(output / TOKENS, files.read(pictures))
        records.write(output / "report.json", result)
        write_markdown(workdirs[0], result, output)
    print(markdown_of(result, summarise(result["rows"], of_metrics(result["backbone"]))))


def _output(name: str, workdirs: list[Path]) -> Path:
    """Where files go. Raises InputError for a workdir: it has a report of its own, and a run may be writing it."""
    path = Path(os.path.expanduser(name))
    if not name or any(path.exists() and workdir.exists() and path.samefile(workdir) for workdir in workdirs):
        raise InputError(
            f"--output is {name!r}; give a folder of its own: what a run leaves in its workdir stays as it is"
        )
    return path
