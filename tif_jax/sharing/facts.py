"""What a workdir knows of the model that it stands for: from what it was made, on which images, and what was measured."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tif_jax.runtime import records
from tif_jax.tasks import CLASSIFICATION, Metric, of_metrics
from tif_jax.training.checkpoints import identity, read_config
from tif_jax.weights.where import checkpoint_directory

_REMEDY = "`tif run` makes it anew"


@dataclasses.dataclass(frozen=True)
class Facts:
    """base_model: hf:OWNER/NAME[@REVISION] or a file's name. license: as hubs name it. data: of the config, without paths.

    measured: (what, figure) in the order to show them. versions: of the software that measured.
    """

    base_model: str = ""
    license: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def with_(self, license: str, base_model: str) -> "Facts":
        """These facts, and what the user says."""
        return dataclasses.replace(self, license=license, base_model=base_model or self.base_model)


def of_workdir(workdir: Path, checkpoint: Path) -> Facts:
    """Of one checkpoint of a workdir, or of a stage's folder in one. Figures of another do not count."""
    checkpoints, stored = checkpoint_directory(workdir), read_config(checkpoint)
    settings, digest = stored.get("config") or {}, identity(stored)["digest"]
    data = dict(settings.get("data") or {})
    metrics = records.read(checkpoints.parent / "metrics.json", _REMEDY) or {}
    report = records.read(workdir / "report.json", _REMEDY) or {}
    benchmark = records.read(workdir / "benchmark.json", _REMEDY) or {}
    row: Mapping[str, Any] = next((row for row in report.get("rows", ()) if _is_of(row, digest)), {})
    begun = settings.get("backbone", {}).get("init_from") or settings.get("init_from") or ""
    measured = _accuracy(metrics if _is_of(metrics, digest) else {}, row, report.get("backbone") or {})
    measured += _speed(row.get("label"), benchmark)
    return Facts(
        base_model=begun if begun.startswith("hf:") else Path(begun).name,
        data=data
        and {**data, "root": Path(data.get("root") or "").name},  # where it lies on this machine is nobody's business
        measured=tuple(measured),
        versions=report.get("versions") or {},
    )


def _is_of(figures: Mapping[str, Any], digest: str) -> bool:
    return (figures.get("checkpoint") or {}).get("digest") == digest


def _accuracy(metrics: Mapping[str, Any], row: Mapping[str, Any], backbone: Mapping[str, Any]) -> list[tuple[str, str]]:
    task, found = of_metrics(metrics or backbone), []
    decides, before = task.headline, f"{task.headline.key}_before"
    for metric in (decides,) if task is CLASSIFICATION else task.metrics:
        if metrics.get(metric.key) is not None:
            where = f"{'of' if metric.unit == '%' else 'on'} {metrics['num_images']} test images"
            found.append((metric.name, f"{_text(metric, metrics[metric.key])} {where}"))
    if row.get(before) is not None:
        found.append((f"{decides.name} before fine-tuning", _text(decides, row[before])))
    if "gmac" in metrics:
        found.append(("cost", f"{metrics['gmac']:.3g} GMAC (10⁹ multiply-adds) an image"))
    if row and backbone.get(decides.key) is not None:
        cost = f", {backbone['gmac']:.3g} GMAC" if "gmac" in backbone else ""
        told = f"{decides.name} {_text(decides, backbone[decides.key])}{cost}"
        found.append(("the backbone without a reducer", told))
    return found


def _text(metric: Metric, value: float) -> str:
    return metric.text(value, 1 if metric.unit == "%" else None)


def _speed(label: str | None, benchmark: Mapping[str, Any]) -> list[tuple[str, str]]:
    row = next((row for row in benchmark.get("rows", ()) if row.get("label") == label), None)
    if row is None:
        return []
    where = f"at batch size {row['batch_size']} in {row['dtype']} on {benchmark['device']}"
    return [("speed", f"{row['images_per_second']:.0f} images/s {where}")]
