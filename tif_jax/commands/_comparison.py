"""Several runs side by side: what they differ in, which of their figures can be compared, tables and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tif_jax.commands._report import heading, table_of
from tif_jax.commands._results import curves_of, result_of, summarise
from tif_jax.commands._tables import Column, markdown
from tif_jax.data.preprocess import PARTS
from tif_jax.errors import InputError
from tif_jax.figures import comparison as plots
from tif_jax.runtime import files, records
from tif_jax.tasks import Task, of_metrics
from tif_jax.training.recipe import WITHOUT_EFFECT

_SAME_VIEWS = ("image_size", *PARTS)
_SAME_PIXELS = ("eigen_crop", "max_depth")
_ALL_PIXELS = {"eigen_crop": False}
_WHICH = ("name", "root", "tfds_name", "test_split", "num_test", "seed")
_LONGEST = 200  # characters of a value in a table


def compare(workdirs: Sequence[Path]) -> dict[str, Any]:
    """The content of comparison.json: `runs` (each a result with its name), `differing` keys of their configs, `rows`.

    `not_comparable` says why their metrics can not be compared, `speed_note` what holds for images/s; `same_speed` whether
    they were measured on the same devices of one machine, with one batch size and dtype. Raises InputError for runs of
    several tasks.
    """
    names = _names(workdirs)
    runs = [{"name": name, **result_of(workdir)} for name, workdir in zip(names, workdirs, strict=True)]
    task = _task_of(runs)
    same_speed = all(run["speed"] for run in runs) and not _differing([run["speed"] for run in runs])
    rows = [{"run": run["name"], **row} for run in runs for row in summarise(run["rows"], task)]
    if not same_speed:
        rows = [row | {"images_per_second": None} for row in rows]
    return {
        "runs": runs,
        "differing": _configs([run["config"] for run in runs]),
        "not_comparable": _not_comparable(runs),
        "same_speed": same_speed,
        "speed_note": _speed_note(runs, same_speed),
        "rows": rows,
    }


def write(workdirs: Sequence[Path], found: Mapping[str, Any], folder: Path) -> None:
    """FOLDER/comparison.md, comparison.json and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    task = _task_of(found["runs"])
    plots.outcomes(found["rows"], "gmac", "GMAC per image", folder / "accuracy_cost.png", task.headline)
    if found["same_speed"]:
        plots.outcomes(found["rows"], "images_per_second", "images/s", folder / "accuracy_speed.png", task.headline)
    names = [run["name"] for run in found["runs"]]
    curves = {name: curves_of(workdir) for name, workdir in zip(names, workdirs, strict=True)}
    plots.losses(curves, folder / "training.png", task)
    records.write(folder / "comparison.json", found)
    files.write(folder / "comparison.md", markdown_of(found, pictures=True).encode())


def markdown_of(found: Mapping[str, Any], pictures: bool = False) -> str:
    runs, rows, task = found["runs"], found["rows"], _task_of(found["runs"])
    decides = task.headline.name[:1].upper() + task.headline.name[1:]
    run = Column("run", ("run",), lambda name: f"`{name}`")
    shown = ["accuracy_cost", *(["accuracy_speed"] if found["same_speed"] else []), "training"]
    seeds = sorted({row["num_seeds"] for row in rows})
    lines = [
        "# Comparison of runs",
        "",
        *(line for run in runs for line in (f"## `{run['name']}`", "", *heading(run), "")),
        "## What differs in their configs",
        "",
        *_differences(found["differing"], [run["name"] for run in runs]),
        "",
        "## Accuracy and cost after fine-tuning",
        "",
        *(f"**{decides} can not be compared**: {reason}." for reason in found["not_comparable"]),
        *([""] if found["not_comparable"] else []),
        f"Mean ± standard deviation over {' or '.join(map(str, seeds)) or 'no'} seeds, where these differ. "
        f"{found['speed_note']}",
        "",
        *(table_of(rows, task, run) if rows else ["Nothing is fine-tuned yet."]),
        "",
        *(
            f"`{r['name']}`: not finished, or not evaluated: {', '.join(r['unfinished'])}.\n"
            for r in runs
            if r["unfinished"]
        ),
    ]
    if pictures:
        lines += [line for name in shown for line in (f"![{name.replace('_', ' against ')}]({name}.png)", "")]
    return "\n".join(lines)


def _task_of(runs: Sequence[Mapping[str, Any]]) -> Task:
    """Raises InputError if it is not the same for all of them."""
    found = {run["name"]: of_metrics(run["backbone"]) for run in runs}
    if len({*found.values()}) > 1:
        told = ", ".join(f"{name} is {task.name}" for name, task in found.items())
        raise InputError(f"the runs are of several tasks ({told}); compare those of one")
    return next(iter(found.values()))


def _names(workdirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    parts = [workdir.absolute().parts for workdir in workdirs]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-number:]) for path in parts]
        if len({*names}) == len(names):
            return names
    return [str(workdir) for workdir in workdirs]


def _differing(records_: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys that not all of these have alike, with the value of each."""
    first, *others = records_
    keys = {key for other in others for key in records.differences(first, other)}
    return {key: [_at(record, key.split(".")) for record in records_] for key in sorted(keys)}


def _at(record: Any, path: Sequence[str]) -> Any:
    for part in path:
        record = record.get(part) if isinstance(record, Mapping) else None
    return record


def _configs(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys of configs that differ, but for those without effect on results and what `quick` would change."""
    found = _differing([{key: value for key, value in config.items() if key != "when_quick"} for config in configs])
    return {key: values for key, values in found.items() if not {*key.split(".")} & {*WITHOUT_EFFECT}}


def _not_comparable(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons why the metrics of these runs say nothing of which is better."""
    reasons = []
    if _differing([_images_of(run["test"]) for run in runs]):
        sizes = ", ".join(f"`{run['name']}` has {run['test']['num_images']}" for run in runs)
        reasons.append(f"the runs were evaluated on different test images ({sizes})")
    views = [{key: run["test"]["data"].get(key) for key in _SAME_VIEWS} for run in runs]
    for key, values in _differing(views).items():
        told = ", ".join(f"`{run['name']}` {value}" for run, value in zip(runs, values, strict=True))
        reasons.append(f"images were prepared differently, data.{key}: {told}")
    pixels = [{**_ALL_PIXELS, **{key: run["test"][key] for key in _SAME_PIXELS if key in run["test"]}} for run in runs]
    for key, values in _differing(pixels).items():
        if None in values:  # of one it is not known
            continue
        told = ", ".join(f"`{run['name']}` {value}" for run, value in zip(runs, values, strict=True))
        reasons.append(f"not the same pixels count, {key}: {told}")
    return reasons


def _images_of(test: Mapping[str, Any]) -> dict[str, Any]:
    """What tells test images apart: their fingerprint; of a source that has none, what the config says of them."""
    of = test["examples"] or {key: test["data"].get(key) for key in _WHICH}
    return {"num_images": test["num_images"], "of": of}


def _speed_note(runs: Sequence[Mapping[str, Any]], same: bool) -> str:
    within = "`x full` is within each run, where speeds are measured interleaved."
    if same:
        return f"Images/s are of one machine, but not of one time: what else it did then is in them. {within}"
    without = [run["name"] for run in runs if not run["speed"]]
    if without:
        return f"Images/s are not compared: not measured in {', '.join(without)}. {within}"
    told = ", ".join(_differing([run["speed"] for run in runs]))
    return f"Images/s are not compared: they were measured with another {told}. {within}"


def _differences(differing: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[str]:
    if not differing:
        return ["Nothing."]
    columns = [Column("key", ("key",), lambda key: f"`{key}`")]
    columns += [Column(f"`{name}`", (str(i),), _short) for i, name in enumerate(names)]
    return markdown(columns, [{"key": key} | {str(i): v for i, v in enumerate(row)} for key, row in differing.items()])


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        value = ", ".join(map(_entry, value))  # of benchmark.reducers
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _entry(reducer: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in reducer.items() if key != "name")
    return f"{reducer['name']}({options})" if options else reducer["name"]
