"""Tasks as plain data, without JAX: what a model of each is measured by, and which of these metrics decides."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tif_jax.errors import InputError


class Metric(NamedTuple):
    """A number of metrics.json that tables have a column for."""

    key: str
    name: str  # for readers
    unit: str  # that it is printed in: '%', 'm', or '' where it has none
    digits: int  # behind the point
    factor: float = 1.0  # from metrics.json to that unit
    most: float | None = None  # what it can not exceed, in that unit
    higher_is_better: bool = True

    @property
    def heading(self) -> str:
        """Of a column."""
        return f"{self.name} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """Of an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def merit(self, value: float) -> float:
        """The value, negative where lower is better: the largest merit is the best."""
        return value if self.higher_is_better else -value

    def text(self, value: float, digits: int | None = None) -> str:
        """The value with its unit."""
        return f"{self.factor * value:.{self.digits if digits is None else digits}f} {self.unit}".rstrip()


class Task(NamedTuple):
    """headline: what rows are drawn and `best` is chosen by; others: what tables show beside it."""

    name: str  # the field `task` of a model
    headline: Metric
    others: tuple[Metric, ...]
    hub_tag: str  # what hubs call it
    loss: str  # of an axis with training losses
    divergence: str = "divergence (nats)"  # of one with losses against a teacher's prediction

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (self.headline, *self.others)


_PERCENT: dict[str, Any] = dict(unit="%", digits=2, factor=100.0, most=100.0)

CLASSIFICATION = Task(
    "classification",
    Metric("top1", "top-1", **_PERCENT),
    (Metric("top1_among_classes", "among classes", **_PERCENT),),  # where the data set has fewer classes than the model
    "image-classification",
    "loss (nats)",
)
DEPTH = Task(
    "depth",
    Metric("rmse", "RMSE", "m", 3, higher_is_better=False),
    (
        Metric("abs_rel", "AbsRel", "", 3, higher_is_better=False),
        Metric("delta1", "delta1", "", 3, most=1.0),
    ),
    "depth-estimation",
    "scale-invariant log loss",
    "RMS difference of ln depth",
)
SEGMENTATION = Task(
    "segmentation",
    Metric("miou", "mIoU", **_PERCENT),
    (Metric("pixel_accuracy", "pixel accuracy", **_PERCENT),),
    "image-segmentation",
    "loss (nats)",
)
TASKS = {task.name: task for task in (CLASSIFICATION, DEPTH, SEGMENTATION)}


def of_name(name: str) -> Task:
    """Raises InputError for another name."""
    if name not in TASKS:
        raise InputError(f"the task is {name!r}; it is one of {', '.join(TASKS)}")
    return TASKS[name]


def of_metrics(metrics: Mapping[str, Any]) -> Task:
    """The task that the entries of a metrics.json are of. Those of classification do not name it."""
    return of_name(metrics.get("task", CLASSIFICATION.name))
