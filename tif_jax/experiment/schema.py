"""The schema of a config: its sections, and the `Experiment` that they make: all that a run has to know.

`data`, and what the sections that train have in common, are defined where they are read (`data.options`,
`training.recipe`).
"""

import dataclasses
import re
from typing import Any

from tif_jax import checked
from tif_jax.checked import key, section
from tif_jax.data.joint_views import check_joint
from tif_jax.data.options import DataOptions
from tif_jax.errors import InputError
from tif_jax.experiment.reducer_entry import ReducerEntry
from tif_jax.impact.oracle import ESTIMATORS, MASKS, TARGETS, check_options
from tif_jax.tasks import CLASSIFICATION
from tif_jax.training.recipe import MOST_EPOCHS, MOST_IMAGES, FreshViews, NetworkRecipe, Recipe, Sharding

DTYPES = ("float32", "bfloat16")
MOST_SAMPLES = 10**5
_ANY_SEED = dict(least=0, below=2**31)


@dataclasses.dataclass(frozen=True)
class Backbone(NetworkRecipe):
    """The ViT before reduction: imported, trained from random weights or under a fresh head, or (num_epochs 0) untrained."""

    init_from: str = key(
        "", "a weight file, its folder, hf:OWNER/NAME[@REVISION] or a checkpoint; '': random weights of `model`"
    )
    head: str = key(
        "",
        "fresh: a new head, with an output for each class of the data, and the network is trained; '': that of init_from or "
        "`model`",
        choices=("", "fresh"),
    )
    model: dict[str, Any] = key(
        {}, "fields of the model, as in dict(image_size=64, patch_size=8, ...); with init_from: those it does not say"
    )
    num_heads: int = key(
        0, "attention heads of a weight file, which does not say how many; 0: what timm has for its size", least=0
    )

    @property
    def is_trained(self) -> bool:
        return self.num_epochs > 0 and not (self.init_from and not self.head)


@dataclasses.dataclass(frozen=True)
class Score:
    """How the impact of the training images' tokens is measured."""

    estimator: str = key(
        "sampled",
        "exact: mask one token at a time; gradient: one backward pass; sampled: mean over random masks",
        choices=ESTIMATORS,
    )
    mask: str = key(
        "drop",
        "exact only: what a masked token is: zeros, its position embedding, or absent; the others drop",
        choices=MASKS,
    )
    target: str = key(
        "teacher",
        "label: loss with the true label; teacher: divergence from the unmasked network's prediction",
        choices=TARGETS,
    )
    num_samples: int = key(16, "sampled only: random masks of each image", least=1, most=MOST_SAMPLES)
    keep_ratio: float = key(0.5, "sampled only: expected fraction of tokens that a random mask leaves", above=0, most=1)
    views: int = key(
        1, "views of each image that are scored: the evaluation view, then augmented ones", least=1, most=1000
    )
    num_images: int = key(0, "how many training images are scored, evenly spaced; 0: all", least=0, below=2**31)
    batch_size: int = key(32, "images at once", least=1, most=MOST_IMAGES)
    chunk: int = key(
        0, "masked images at once on a device; 0: what suits and fits into its memory", least=0, most=MOST_IMAGES
    )
    dtype: str = key(
        "", "what the network computes in; '': float32 for exact and on CPUs, else bfloat16", choices=("", *DTYPES)
    )
    part: str = key("", "K/N: this job scores the K-th of N parts; '': all of them")

    def __post_init__(self):
        self.oracle_options(self.target)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part)
        if self.part and not (match and 1 <= int(match[1]) <= int(match[2])):
            raise InputError(f"part is {checked.shown(self.part)}; it is K/N with 1 <= K <= N, as in 3/64")

    def oracle_options(self, target: str, num_samples: int | None = None) -> dict[str, Any]:
        """Arguments of the oracle for a target. InputError where they contradict each other."""
        return check_options(
            estimator=self.estimator,
            mask=self.mask if self.estimator == "exact" else "drop",
            target=target,
            num_samples=num_samples or self.num_samples,
            keep_ratio=self.keep_ratio,
        )


@dataclasses.dataclass(frozen=True)
class Filter(Recipe):
    """What is fitted before fine-tuning while the backbone rests: tif's token filter to impact, tosa's selectors."""

    num_epochs: float = key(6.0, "epochs", above=0, most=MOST_EPOCHS)
    labels: str = key(
        "top",
        "a token is worth keeping if it is among an image's best, above rho nats, or above the data's quantile rho",
        choices=("top", "above", "quantile"),
    )
    keep_ratio: float | None = key(
        None,
        "with top the fraction of an image's tokens labelled worth keeping; what an adapter is fitted with; none: tif's own",
        above=0,
        most=1,
    )
    rho: float = key(0.0, "threshold of impact: nats with above, a fraction in (0, 1) with quantile")
    balance: bool = key(False, "give both labels the same weight in the loss, however rare one is")

    def __post_init__(self):
        super().__post_init__()
        if self.labels == "quantile" and not 0 < self.rho < 1:
            raise InputError(f"rho is {self.rho}; with labels 'quantile' it is a fraction in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Adapter(Recipe):
    """tif's adapter, fitted behind its filter while the rest of the network rests."""

    num_epochs: float = key(4.0, "epochs", above=0, most=MOST_EPOCHS)
    as_used: bool = key(
        False,
        "fitted with the reducer's own amount and what follows it; else alone, with filter.keep_ratio, for any of them",
    )


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What fine-tuning learns from a teacher."""

    kind: str = key(
        "",
        "what is learned of the teacher: soft: its distribution (DynamicViT); hard: its top class (DeiT); '': nothing",
        choices=("", "soft", "hard"),
    )
    teacher: str = key("", "a checkpoint or weight file; '': the unreduced backbone")
    logits_weight: float = key(0.5, "weight of the loss against the teacher's prediction", least=0, most=1e6)
    tokens_weight: float = key(
        0.5, "soft only: weight of the loss against the teacher's output tokens", least=0, most=1e6
    )

    def __post_init__(self):
        if self.kind == "hard" and self.logits_weight > 1:
            raise InputError(
                f"logits_weight is {self.logits_weight:g}; with kind 'hard' at most 1: the labels have the rest"
            )


@dataclasses.dataclass(frozen=True)
class Finetune(NetworkRecipe):
    """The whole network with its reducer."""

    num_epochs: float = key(10.0, "epochs", above=0, most=MOST_EPOCHS)
    model: dict[str, Any] = key({}, "fields of the model that differ from the backbone's, as in dict(class_head=True)")
    phases: tuple[dict, ...] = key((), "dict(until=EPOCH, OPTION=...): the reducer's options before that epoch")
    distillation: Distillation = section(Distillation)

    def __post_init__(self):
        super().__post_init__()
        ends: list[Any] = [phase.get("until") for phase in self.phases]
        numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
        if not numbers or ends != sorted(ends) or not all(0 < end < self.num_epochs for end in ends):
            raise InputError(
                f"phases last until the epochs {ends}; give each an `until`, ascending, below num_epochs, "
                f"{self.num_epochs:g}, as in (dict(until=2, keep_ratio=0.9),)"
            )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """How checkpoints and rankings are judged on test images."""

    batch_size: int = key(64, "images at once, over all devices of all processes", least=1, most=MOST_IMAGES)
    num_images: int = key(
        500, "test images that both oracles score for the report's table of rankings; 0: all", least=0, below=2**31
    )
    num_samples: int = key(
        8, "random masks with which the impact is measured on each of them", least=1, most=MOST_SAMPLES
    )
    eigen_crop: bool = key(
        False,
        "depth only: compare the part of the picture that results on NYU Depth V2 are reported for (Eigen et al.)",
    )


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Which reducers stand in the report, and how their speed is measured."""

    batch_size: int = key(64, "images at once, over all devices of this process", least=1, most=MOST_IMAGES)
    dtype: str = key("float32", "what the network computes in while its speed is measured", choices=DTYPES)
    reducers: tuple[ReducerEntry, ...] = key(
        (),
        "which reducers, each a dict(name=..., OPTION=...) or a name, which stands for dict(name=NAME); (): the config's own",
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config, read and checked. An entry of benchmark.reducers takes over what `reducer` has and it lacks (`config`)."""

    seed: int = key(0, "seed of fresh weights, the order of the data and what training draws", **_ANY_SEED)
    seeds: int = key(1, "how many times filter and fine-tuning are run: with seed, seed + 1, ...", least=1, most=1000)
    quick: bool = key(False, "run the short version: what `when_quick` says replaces the other values")
    dtype: str = key("float32", "what the network computes in; its parameters are float32", choices=DTYPES)
    peak_tflops: float = key(
        0.0,
        "peak TFLOP/s of one device, to report how much of it is used; 0: what the program knows of the device",
        least=0,
    )
    sharding: Sharding = section(Sharding)
    data: DataOptions = section(DataOptions)
    backbone: Backbone = section(Backbone)
    score: Score = section(Score)
    reducer: ReducerEntry = key(
        ReducerEntry("full"),
        "the reducer that is fine-tuned, a name or dict(name=..., OPTION=...); `tif --help reducers` lists the options",
    )
    filter: Filter = section(Filter)
    adapter: Adapter = section(Adapter)
    finetune: Finetune = section(Finetune)
    evaluate: Evaluate = section(Evaluate)
    benchmark: Benchmark = section(Benchmark)
    when_quick: dict[str, Any] = key({}, "keys of the config, with the values that they have under --config.quick=true")

    def __post_init__(self):
        if self.score.views > 1 and self.data.augment == "none":
            raise InputError(
                f"score.views is {self.score.views}, but data.augment 'none' has the evaluation view only: "
                "set score.views=1"
            )

        for name, recipe in (("backbone", self.backbone), ("finetune", self.finetune)):
            if self.data.task != CLASSIFICATION.name and recipe.num_epochs:
                with checked.named(f"{name}.augmentation", [field.name for field in dataclasses.fields(FreshViews)]):
                    check_joint(recipe.augmentation)
                if recipe.mixing.mixup or recipe.mixing.cutmix:
                    raise InputError(
                        f"{name}.mixing is for images with one label each, and these have label maps: turn both off"
                    )
            elif recipe.augmentation.rotate and recipe.num_epochs:
                raise InputError(
                    f"{name}.augmentation.rotate is for data with label maps; rand_augment turns other images"
                )
            if self.data.augment == "none" and recipe.num_epochs and recipe.augmentation != FreshViews():
                raise InputError(
                    f"{name}.augmentation is for views that are drawn anew, of which data.augment 'none' has none"
                )

    def under(self, reducer: ReducerEntry, seed: int | None = None) -> "Experiment":
        """The same with another reducer, and another seed."""
        return dataclasses.replace(self, reducer=reducer, seed=self.seed if seed is None else seed)
