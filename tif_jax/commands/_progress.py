"""What a workdir's files say of its stages and its log of the time that they took; no JAX, and nothing is written."""

import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tif_jax.errors import InputError
from tif_jax.runtime import locks, log_file, metrics_log, records
from tif_jax.tasks import of_metrics

Stage = dict[str, Any]  # folder, kind, state ("done", "begun", "to do", "broken"), done, of, unit, told

_FOLDERS = ("backbone", "impact", "heldout-label", "heldout-teacher", "filter*", "adapter*", "finetune/*")
_ENTRY = re.compile(r"(\S+ \S+) (\d+) (.*)")
_PROGRESS = re.compile(r"(?P<title>.+): (?P<done>\d+) of (?P<of>\d+) \w+.*, (?P<left>[\d:]+) left")
_BEGUN = re.compile(r"(?P<title>.+): steps (?P<done>\d+) to (?P<of>\d+) on .*")
_KINDS = {"backbone": "backbone", "impact": "score", "heldout": "score", "filter": "filter", "adapter": "adapter"}


def planned(workdir: Path, plan: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The stages of DIR/run.json with folder and kind ("train", "score"); without it, those that have a folder."""
    if plan:
        return plan["stages"]
    there = [path for path in (*workdir.glob("*"), *workdir.glob("finetune/*")) if path.is_dir() or path.is_symlink()]
    names = sorted(str(path.relative_to(workdir)) for path in there)
    found = [name for pattern in _FOLDERS for name in names if fnmatch(name, pattern)]
    scored = ("impact", "heldout-label", "heldout-teacher")
    return [{"folder": name, "kind": "score" if name in scored else "train"} for name in found]


def state_of(workdir: Path, planned: Mapping[str, str]) -> Stage:
    """How far a stage is. `told` says figures, or what is wrong and how to go on."""
    folder, kind = workdir / planned["folder"], planned["kind"]
    stage: Stage = {"folder": planned["folder"], "kind": kind, "state": "to do", "done": 0, "of": None, "told": ""}
    stage["unit"] = "steps" if kind == "train" else "images"
    try:
        if folder.is_symlink() and not folder.exists():
            raise InputError(f"a link to {folder.readlink()}, which is not there: put that back, or delete the link")
        if folder.is_dir():
            stage |= _trained(folder) if kind == "train" else _scored(folder)
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        stage |= {"state": "broken", "told": " ".join(str(error).split()) or type(error).__name__}
    return stage


def _trained(folder: Path) -> Stage:
    records.read(folder / "config.json", f"put back a copy, or delete {folder} to make it anew")
    steps = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit() and path.is_dir()]
    lines = metrics_log.read(folder)
    told = [f"loss {lines[-1]['loss']:.4g}"] if lines and lines[-1].get("loss") is not None else []
    reached = lines[-1]["step"] if lines else 0
    if not steps:
        return {"state": "begun", "done": reached, "told": ", ".join(["no checkpoint yet", *told])}
    newest = max(steps, key=lambda path: int(path.name))
    try:
        saved = records.opened(json.loads((newest / "config" / "metadata").read_bytes()))
        step, of = saved["step"], saved.get("of", saved["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"checkpoint {newest} is damaged: the same command again goes on from the one before it, or put back a copy"
        ) from None
    if step < of:
        return {"state": "begun", "done": max(step, reached), "of": of, "told": ", ".join([f"saved at {step}", *told])}
    metrics = records.read(folder / "metrics.json") or {}
    headline = of_metrics(metrics).headline
    found = metrics.get(headline.key)
    told += [f"{headline.name} {headline.text(found)}"] if found is not None else []
    told += [f"from {note['workdir']}"] if (note := records.read(folder / "taken_from.json")) else []
    return {"state": "done", "done": step, "of": of, "told": ", ".join(told)}


def _scored(folder: Path) -> Stage:
    if not (folder / "manifest.json").exists():
        if any(folder.glob("part-*")):
            raise InputError(f"{folder} has parts but no manifest.json: delete {folder} and score again")
        return {}
    manifest = records.read(folder / "manifest.json", f"delete {folder} and score again")
    parts = [path for path in folder.glob("part-*.json") if path.with_suffix(".parquet").exists()]
    done = sum(json.loads(path.read_bytes())["rows"] for path in parts)
    of = manifest["num_images"] * manifest["views"]
    told = f"{len(parts)} of {manifest['num_parts']} parts"
    if note := records.read(folder / "taken_from.json"):
        told += f", from {note['workdir']}"
    if held := sum(locks.is_held(path) is True for path in folder.glob(".part-*.lock")):
        told += f", {held} being scored now"
    finished = len(parts) >= manifest["num_parts"]
    unreadable = finished and done < of
    return {
        "state": "done" if finished else "begun",
        "done": done,
        "of": of,
        "told": f"{told}, {of - done} images could not be read" if unreadable else told,
    }


# The log


def entries(workdir: Path) -> list[tuple[datetime, int, str]]:
    """Time, process and text of the lines of DIR/log.txt and of the one before it, but those that belong to another."""
    found = []
    for name in ("log.1.txt", "log.txt"):
        path = workdir / name
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            if match := _ENTRY.fullmatch(line):
                try:
                    found.append((datetime.strptime(match[1], log_file.TIME), int(match[2]), match[3]))
                except ValueError:
                    continue
    return found


def seconds_of(log: Sequence[tuple[datetime, int, str]]) -> dict[str, float]:
    """Mean seconds of the finished stages of each kind ("filter", "finetune", ...), of all runs that worked at them.

    Those that were taken over from another workdir say nothing of it.
    """
    spent: dict[str, float] = {}
    ended = set()
    now: dict[int, tuple[str, datetime]] = {}  # the stage that each process is at
    for at, process, text in log:
        if text.startswith(("stage ", "begins: ", "ends: ")):
            if process in now:
                name, since = now.pop(process)
                spent[name] = spent.get(name, 0.0) + (at - since).total_seconds()
                ended |= {name} if not text.startswith("ends: ") else set()
            if text.startswith("stage "):
                now[process] = text.removeprefix("stage "), at
        elif " is taken over from " in text:
            now.pop(process, None)
    kinds: dict[str, list[float]] = {}
    for name in ended:
        kinds.setdefault(name.partition(",")[0], []).append(spent[name])
    return {kind: statistics.mean(times) for kind, times in kinds.items()}


def last_progress(log: Sequence[tuple[datetime, int, str]], process: int) -> dict[str, Any] | None:
    """The last progress line of a process since its last stage began: title, done, of, its age in seconds.

    seconds_left: from now on; None where the line does not say it.
    """
    for at, who, text in reversed(log):
        if who != process:
            continue
        if text.startswith(("stage ", "begins: ")):
            return None
        if match := _PROGRESS.fullmatch(text) or _BEGUN.fullmatch(text):
            age, left = time.time() - at.timestamp(), None
            if "left" in match.groupdict():
                seconds = [int(part) for part in match["left"].split(":")]
                left = max(0.0, sum(60**i * part for i, part in enumerate(reversed(seconds))) - age)
            title, done, of = Path(match["title"]).name, int(match["done"]), int(match["of"])
            return {"title": title, "done": done, "of": of, "age": age, "seconds_left": left}
    return None


def kind_of(folder: str) -> str:
    """Of a stage in the log, from its folder."""
    return _KINDS.get(re.split(r"[-/]", folder)[0], "finetune")


def bytes_in(folder: Path) -> int:
    """On disk, each file once, however many names it has."""
    return sum({(stat.st_dev, stat.st_ino): 512 * stat.st_blocks for stat in _stats(folder)}.values())


def _stats(folder: Path) -> Iterator[Any]:
    for path in folder.rglob("*"):
        try:
            yield path.lstat()
        except OSError:  # it has just gone
            continue
