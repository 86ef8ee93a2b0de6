"""What a run takes over of an earlier one (`--from DIR`): stages that are finished there and have the same settings.

Large files become hard links where the file system has them, the rest copies: so the earlier folder is never written to,
and may be moved or deleted afterwards. Each folder that was taken over says so in `taken_from.json`.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.experiment.predecessors import finished
from tif_jax.impact.manifest import as_known_there, read_manifest
from tif_jax.impact.shards import missing_parts
from tif_jax.runtime import files, log_file, processes, records
from tif_jax.training.checkpoints import read_config
from tif_jax.training.recipe import may_differ

logger = logging.getLogger(__name__)

NOTE = "taken_from.json"
_LINKED = 2**16  # bytes from which a file is linked; what is appended to (metrics.jsonl) is copied always


def check(earlier: Path, workdir: Path) -> None:
    """Raises InputError for a folder that nothing can be taken from."""
    leave = "leave --from out to make everything anew"
    if not earlier.is_dir():
        raise InputError(f"--from {earlier} is not there; what was taken over of it is not lost: {leave}")
    if workdir.exists() and earlier.samefile(workdir):
        raise InputError(f"--from is {earlier}, as --workdir is; {leave}")
    if earlier.resolve() in workdir.resolve().parents:
        raise InputError(
            f"--workdir lies in --from {earlier}, which stays as it is: give a folder beside it, or {leave}"
        )
    if not (earlier / "backbone").is_dir():
        raise InputError(f"--from {earlier} is no workdir: it has no backbone/; {leave}")


def take_stage(earlier: Path, workdir: Path, folder: Path, made: Mapping[str, Any], num_steps: int) -> None:
    """A stage that trains, unless the workdir has begun its own. made: what its folder is to be claimed for."""
    there = earlier / folder.relative_to(workdir)

    def sources() -> list[Path]:
        checkpoint, which = finished(there)
        _check_same(read_config(checkpoint).get("made") or {}, {**made}, may_differ(made.get("examples")))
        _check_same({"steps": which["of"]}, {"steps": num_steps})
        return [checkpoint, *(there / name for name in ("metrics.json", "metrics.jsonl"))]

    _take(earlier, workdir, folder, sources)


def take_impacts(earlier: Path, workdir: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Impact shards, all parts or none, unless the workdir has begun its own. manifest: but for the number of parts."""
    there = earlier / folder.relative_to(workdir)

    def sources() -> list[Path]:
        found = read_manifest(there)
        _check_same(found, as_known_there(found, manifest), ["versions", "format_version", "num_parts"])
        if missing := missing_parts(there, found["num_parts"], verify=False):
            raise InputError(f"{there} lacks {len(missing)} of {found['num_parts']} parts")
        return [there / "manifest.json", *there.glob("part-*")]

    _take(earlier, workdir, folder, sources)


def _take(earlier: Path, workdir: Path, folder: Path, sources: Callable[[], Sequence[Path]]) -> None:
    """Puts the sources into the folder, at the same place below it as in the earlier workdir; or says why not."""
    there = earlier / folder.relative_to(workdir)
    if processes.is_first() and not os.path.lexists(folder):
        if not there.is_dir():
            logger.info("%s is made anew: there is no %s", folder, there)
        else:
            try:
                _copy(there, folder, sources(), {"workdir": str(earlier.absolute())})
                logger.info("%s is taken over from %s", folder, there)
            except InputError as error:
                logger.info("%s is made anew: %s", folder, str(error).partition(";")[0])  # without the remedy
    processes.wait_for_all(f"{folder.name} looked for")


def _copy(there: Path, folder: Path, sources: Sequence[Path], note: dict[str, str]) -> None:
    there = there.absolute()
    with files.appearing(folder) as partial, files.writing(folder):
        partial.mkdir()
        for source in map(Path.absolute, sources):
            target = partial / source.relative_to(there)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link_or_copy)
            elif source.exists():
                _link_or_copy(source, target)
        records.write(partial / NOTE, note | {"date": time.strftime(log_file.TIME)})


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    if os.path.getsize(source) >= _LINKED and not str(source).endswith(".jsonl"):
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(source, target)


def _check_same(there: Mapping[str, Any], here: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
    """Raises InputError that names the first difference, and how many more there are."""
    different = [
        (key, values)
        for key, values in sorted(records.differences(there, here).items())
        if not {*key.split(".")} & {*ignored}
    ]
    if different:
        key, (was, wanted) = different[0]
        more = f", and {len(different) - 1} more keys differ" if len(different) > 1 else ""
        raise InputError(f"{key} is {_short(was)} there, {_short(wanted)} here{more}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
