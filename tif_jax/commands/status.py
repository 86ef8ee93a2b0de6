"""How far the runs in workdirs are, and how long still: from their files alone, also while they run. Nothing is locked."""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tif_jax.commands import _progress
from tif_jax.commands._parser import Parser
from tif_jax.errors import InputError
from tif_jax.runtime import locks, records


def main(argv: list[str]) -> None:
    parser = Parser(prog="tif status", description=__doc__, allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="the --workdir of a run")
    parser.add_argument("--json", action="store_true", help="print JSON: a list with an entry per DIR")
    arguments = parser.parse_args(argv)
    found = [status(Path(os.path.expanduser(name))) for name in arguments.workdirs]
    print(json.dumps(found, indent=2) if arguments.json else "\n\n".join(map(as_text, found)))


def status(workdir: Path) -> dict[str, Any]:
    """What its files say. Raises InputError if it is no workdir.

    running: who holds the folder, or None; None also stands for `seconds_left` where it is not known. problems: what is
    wrong, and how to go on.
    """
    if not workdir.is_dir():
        raise InputError(f"{workdir} is no folder; give the --workdir of a run")
    problems, plan = [], None
    try:
        plan = records.read(workdir / "run.json", "`tif run` writes it anew")
    except InputError as error:
        problems.append(str(error))
    stages = [_progress.state_of(workdir, stage) for stage in _progress.planned(workdir, plan)]
    holder, log = _holder(workdir), _progress.entries(workdir)
    if not (plan or stages or log or holder):
        raise InputError(
            f"{workdir} is no workdir: there is nothing in it that a run left; give the --workdir of a run"
        )
    running = holder is not None and holder["running"] is not False
    last = _progress.last_progress(log, holder["pid"] if holder else log[-1][1]) if log else None
    _mark_current(stages, last, running)
    now = last if running else None
    problems += [f"{stage['folder']}: {stage['told']}" for stage in stages if stage["state"] == "broken"]
    results = {name: (workdir / name).exists() for name in ("benchmark.json", "report.md") if plan}
    command = holder["command"] if holder else plan and plan["command"]
    return {
        "workdir": str(workdir),
        "command": command,
        "running": holder if running else None,
        "was_killed": bool(holder) and not running,
        "finished": bool(plan) and all(stage["state"] == "done" for stage in stages) and all(results.values()),
        "stages": stages,
        "results": results,
        "now": now,
        **_time_left(stages, results, now, _progress.seconds_of(log)),
        "last": _last(log),
        "problems": problems,
        "bytes": _progress.bytes_in(workdir),
    }


def _holder(workdir: Path) -> dict[str, Any] | None:
    """Who has taken the lock, as it says; `running` is None where that can not be seen from here."""
    path = workdir / ".lock"
    if (who := locks.holder(path)) is None:
        return None
    if who["host"] != socket.gethostname():
        return who | {"running": None}
    held = locks.is_held(path)
    return who | {"running": os.path.exists(f"/proc/{who['pid']}") if held is None else held}


def _mark_current(stages: Sequence[dict[str, Any]], last: dict[str, Any] | None, running: bool) -> None:
    """The stage that a running process is at becomes "now", with the count of the last progress line."""
    begun = [stage for stage in stages if stage["state"] == "begun"]
    titled = [stage for stage in begun if last and Path(stage["folder"]).name == last["title"]]
    for stage in (titled or begun)[: 1 if running else 0]:
        stage["state"] = "now"
    for stage in titled[:1]:
        stage["of"] = stage["of"] or (last and last["of"])
        if last and running:
            stage["done"] = max(last["done"], stage["done"])


def _time_left(
    stages: Sequence[dict[str, Any]], results: dict[str, bool], now: dict[str, Any] | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """seconds_left of all stages whose kind has been seen to the end, and the kinds of those that have not."""
    to_come = [_progress.kind_of(stage["folder"]) for stage in stages if stage["state"] == "to do"]
    to_come += ["benchmark"] if results and not results["benchmark.json"] else []
    begun = [_progress.kind_of(stage["folder"]) for stage in stages if stage["state"] in ("begun", "now")]
    known = sum(seconds.get(kind, 0.0) for kind in to_come)
    if now and now["seconds_left"] is not None:
        known += now["seconds_left"]
    else:
        to_come = begun + to_come
        known += sum(seconds.get(kind, 0.0) for kind in begun)
    unknown = [kind for kind in dict.fromkeys(to_come) if kind not in seconds]
    nothing = not known and bool(unknown)
    return {"seconds_left": None if nothing else known, "not_known": unknown}


def _last(log) -> dict[str, Any] | None:
    """The last line of the log, without how the program ended, which is `status`."""
    if not log:
        return None
    ends = [text for _, _, text in log[-1:] if text.startswith("ends: ")]
    at, _, text = log[-2] if ends and len(log) > 1 else log[-1]
    return {"date": at.isoformat(), "text": text, "ended": ends[0].removeprefix("ends: ") if ends else None}


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{found['workdir']}: {_headline(found)}"]
    rows = [
        stage | {"count": _count(stage)} | ({"told": "see below"} if stage["state"] == "broken" else {})
        for stage in found["stages"]
    ]
    names = {"benchmark.json": "benchmark", "report.md": "report"}
    rows += [
        {"folder": names[name], "state": "done" if there else "to do", "count": "", "told": ""}
        for name, there in found["results"].items()
    ]
    width = max((len(row["folder"]) for row in rows), default=0)
    lines += [
        f"  {row['folder']:<{width}}  {row['state']:<6} {row['count']:<24} {row['told']}".rstrip() for row in rows
    ]
    if now := found["now"]:
        lines.append(f"  now: {now['title']}, {now['done']} of {now['of']}, said {_duration(now['age'])} ago")
    if not found["finished"] and (found["seconds_left"] or found["not_known"]):
        lines.append(f"  time left: {_left(found)}")
    if last := found["last"]:
        lines.append(f"  log.txt, {last['date']}: {last['text']}{' (' + last['ended'] + ')' if last['ended'] else ''}")
    lines += [f"  wrong: {problem}" for problem in found["problems"]]
    return "\n".join([*lines, f"  {found['bytes'] / 1e6:.1f} MB on disk"])


def _headline(found: dict[str, Any]) -> str:
    command = f"`{found['command']}`"
    if who := found["running"]:
        sure = "running" if who["running"] else "taken (whether it still runs can be seen there alone)"
        return f"{sure}: {command}, process {who['pid']} on {who['host']} since {who['since']}"
    if found["finished"]:
        return f"finished: {command}"
    if found["was_killed"]:
        return f"stopped, its process is gone; go on with {command}"
    return f"nobody is at it; go on with {command}" if found["command"] else "nobody is at it"


def _count(stage: dict[str, Any]) -> str:
    if stage["state"] in ("to do", "broken") or (stage["state"] == "done" and not stage["of"]):
        return ""
    return f"{stage['done']} of {stage['of'] or '?'} {stage['unit']}"


def _left(found: dict[str, Any]) -> str:
    unknown = ", ".join(found["not_known"])
    if found["seconds_left"] is None:
        return f"not known before one of each has been finished: {unknown}"
    more = f", and what is not known yet: {unknown}" if unknown else ""
    return f"about {_duration(found['seconds_left'])}{more}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
