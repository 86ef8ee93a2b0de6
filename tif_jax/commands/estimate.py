"""What a config would cost on devices that you do not have yet: multiply-adds, hours, dollars, cores that decode, storage."""

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

from tif_jax import data
from tif_jax.commands import _arguments
from tif_jax.commands._estimate_here import reached
from tif_jax.commands._tables import Column, aligned, fixed
from tif_jax.errors import InputError
from tif_jax.experiment import config as config_file
from tif_jax.experiment.estimate import (
    FORWARD,
    SETS,
    Kind,
    Work,
    abstract,
    scoring,
    shard_bytes,
    stages,
)
from tif_jax.experiment.reducer_entry import ReducerEntry
from tif_jax.experiment.schema import Experiment
from tif_jax.experiment.stages import before_backbone
from tif_jax.models import ViT, model_fields
from tif_jax.models.cost import cost
from tif_jax.training.speed import PEAK
from tif_jax.weights import hub
from tif_jax.weights.loading import load_with_fields

_HERE = "here"
_ESTIMATORS = (("exact", "exact", 0), ("gradient", "gradient", 0), ("sampled, 16 masks", "sampled", 16))


def main(argv: list[str]) -> None:
    arguments, overrides = _parsed(argv)
    _arguments.log_to_stderr()
    experiment = config_file.load(os.path.expanduser(arguments.config), overrides)
    fields, teacher = _fields(experiment, arguments.model), _teacher(experiment)
    num_images, num_test = _numbers(experiment, arguments.num_images)
    full = abstract(fields, ReducerEntry("full", {}))
    peak, utilisation = _peak(arguments, fields, experiment)
    of_peak = "as fast as was measured" if arguments.device == _HERE else f"{arguments.utilisation:.0%} of the peak"
    how = f"{arguments.count} x {arguments.device}, {of_peak}"
    print(f"{arguments.config}: {num_images} training images, {num_test} for the test, one reducer, one seed; {how}")
    price = _Price(peak, utilisation, arguments)
    rows = [price.row(work) for work in stages(experiment, fields, num_images, num_test, teacher)]
    sums = {key: sum(row[key] for row in rows) for key in ("images", "petaflop", "hours")}
    rows.append({"name": "all", **sums, "dollars": price.dollars(sums["hours"]), "rate": None, "cores": None})
    print("\n".join(aligned(_columns(arguments), rows)))
    if not isinstance(full, ViT):
        return
    print(f"\nScoring sets of images, {cost(full).gmac:.4g} GMAC a prediction")
    sets = [
        price.row(scoring(f"{name}, {label}", full, number, estimator, samples)) | {"bytes": shard_bytes(full, number)}
        for name, number in SETS.items()
        for label, estimator, samples in _ESTIMATORS
    ]
    print("\n".join(aligned([*_columns(arguments), Column("shards GB", ("bytes",), fixed(2, 1e-9))], sets)))


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _arguments.Parser(prog="tif estimate", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, metavar="NAME|FILE[:ARG]", help="--config.KEY=VALUE overrides a value of it")
    add("--device", required=True, help=f"{', '.join(PEAK)}; or {_HERE}: measured on this machine")
    add("--count", type=int, default=1, metavar="N", help="devices (default: 1)")
    add("--utilisation", type=float, default=0.4, metavar="SHARE", help="of the peak that is reached: assumed (0.4)")
    add("--price", type=float, metavar="DOLLARS", help="of a device for an hour")
    add("--num-images", metavar="TRAINING,TEST", help="how many, if the data are not here")
    add("--model", metavar="NAME", help="timm's name of the network, if its weights are not here")
    add("--decode", type=float, default=105.0, metavar="RATE", help="images/s that a core reads and resizes (105)")
    add(
        "--cores",
        type=float,
        metavar="N",
        help="that decode: where they need longer than the devices, hours are theirs",
    )
    arguments, rest = parser.parse_known_args(argv)
    if stray := [a for a in rest if not a.startswith(("--config.", "--noconfig."))]:
        raise InputError(f"unknown flag {stray[0]}; `tif estimate --help` lists the flags")
    if arguments.device not in (*PEAK, _HERE):
        raise InputError(f"--device is {arguments.device!r}; allowed: {', '.join(PEAK)}, {_HERE}")
    for name, most in (("count", 1e6), ("utilisation", 1.0), ("price", 1e6), ("decode", 1e9), ("cores", 1e9)):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= most:
            raise InputError(f"--{name} is {value:g}; it is above 0, at most {most:g}")
    return arguments, rest


def _fields(experiment: Experiment, name: str | None) -> dict[str, Any]:
    """Of the backbone: by its name, from its weights, or by what the file of weights that are not here is called."""
    start = experiment.backbone.init_from
    if name is None and (not start or _is_here(start)):
        return before_backbone(experiment)[1]
    named = _named(name or start)
    if named is None:
        raise InputError(f"{start} is not here, and {name or _stem(start)!r} is no name of a network: give --model")
    return {**named, **experiment.backbone.model, "image_size": experiment.data.image_size}


def _teacher(experiment: Experiment) -> dict[str, Any] | None:
    """Of the network that fine-tuning learns from, likewise; None where that is the backbone, or there is none."""
    given = experiment.finetune.distillation
    if not (given.kind and given.teacher):
        return None
    if _is_here(given.teacher):
        return load_with_fields(given.teacher, reducer="full")[1]
    named = _named(given.teacher)
    if named is None:
        raise InputError(
            f"finetune.distillation.teacher {given.teacher} is not here, and {_stem(given.teacher)!r} is no name of a "
            "network; give a file that is called as timm calls it: --config.finetune.distillation.teacher=NAME.safetensors"
        )
    return {**named, "image_size": experiment.data.image_size}


def _is_here(weights: str) -> bool:
    """Also what is named on the hub: reading the config has fetched it."""
    return hub.is_name(weights) or Path(weights).expanduser().exists()


def _stem(weights: str) -> str:
    return Path(weights).name.split(".")[0]


def _named(weights: str) -> dict[str, Any] | None:
    """The fields that a name says, timm's or a file's that is called so."""
    try:
        return model_fields(_stem(weights))
    except InputError:
        return None


def _numbers(experiment: Experiment, said: str | None) -> tuple[int, int]:
    if said is not None:
        parts = said.split(",")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise InputError(f"--num-images is {said!r}; it is as in 1281167,50000")
        return int(parts[0]), int(parts[1])
    try:
        return tuple(len(data.open_source(experiment.data, part)) for part in ("train", "test"))  # type: ignore[return-value]
    except InputError as error:
        raise InputError(f"{error}; or give --num-images TRAINING,TEST") from None


def _peak(
    arguments: argparse.Namespace, fields: dict[str, Any], experiment: Experiment
) -> tuple[tuple[float, float], dict[Kind, float]]:
    """(bfloat16, float32) FLOP/s, and the share of it by kind of work. Here: what is reached in float32, for both."""
    if arguments.device != _HERE:
        return PEAK[arguments.device], dict.fromkeys(Kind, arguments.utilisation)
    found = reached(fields, experiment)
    return (found[FORWARD], found[FORWARD]), {kind: found[kind] / found[FORWARD] for kind in Kind}


class _Price(NamedTuple):
    """What work comes to on the devices asked for."""

    peak: tuple[float, float]
    utilisation: dict[Kind, float]
    arguments: argparse.Namespace

    def row(self, work: Work) -> dict[str, Any]:
        """Hours are those of the devices, or of the cores that decode, whichever take longer."""
        given = self.arguments
        seconds = work.seconds(self.peak, self.utilisation, given.count)
        needed = work.images / seconds / given.decode if seconds else 0.0
        if given.cores is not None:
            seconds *= max(1.0, needed / given.cores)
        hours = seconds / 3600
        return {
            "name": work.name, "images": work.images, "petaflop": 2e-15 * work.macs, "hours": hours,
            "dollars": self.dollars(hours), "rate": work.images / seconds if seconds else None, "cores": needed,
        }  # fmt: skip

    def dollars(self, hours: float) -> float | None:
        return None if self.arguments.price is None else hours * self.arguments.count * self.arguments.price


def _columns(arguments: argparse.Namespace) -> list[Column]:
    return [
        Column("", ("name",)),
        Column("images", ("images",), lambda value: f"{value:,.0f}"),
        Column("PFLOP", ("petaflop",), lambda value: f"{value:,.4g}"),
        Column("hours", ("hours",), lambda value: f"{value:,.3g}"),
        *([] if arguments.price is None else [Column("dollars", ("dollars",), lambda value: f"{value:,.2f}")]),
        Column("images/s", ("rate",), fixed(1)),
        Column("cores to decode", ("cores",), fixed(1)),
    ]
