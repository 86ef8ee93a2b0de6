"""The keys of the sections that train, a recipe each, and of `sharding`."""

import dataclasses
from typing import Any

from tif_jax import checked
from tif_jax.checked import key, section
from tif_jax.data.augment import Augmentation
from tif_jax.errors import InputError
from tif_jax.training.mixing import Mixing

MOST_EPOCHS = 1e6
MOST_IMAGES = 2**20  # of a batch; what is beyond is a slip, and would end in a lack of memory
# Keys that change how long something takes, or where it lies, but not what comes out.
WITHOUT_EFFECT = ("save_every", "remat", "num_workers", "worker_processes")


def may_differ(examples: str | None) -> tuple[str, ...]:
    """Keys without effect; where `examples` tell which images there are, the folder that they lie in is none of it."""
    return (*WITHOUT_EFFECT, "root") if examples else WITHOUT_EFFECT


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What every stage that trains reads. An epoch is as many images as the stage's data have."""

    num_epochs: float = key(0.0, "epochs; 0: nothing is trained", least=0, most=MOST_EPOCHS)
    min_steps: int = key(
        0,
        "steps at least: with few images every epoch, those of the warm-up too, counts as more of them",
        least=0,
        below=2**31,
    )
    batch_size: int = key(64, "images of a step, over all devices of all processes", least=1, most=MOST_IMAGES)
    learning_rate: float = key(1e-3, "learning rate after the warm-up, its highest", least=0, most=1e6)
    final_learning_rate: float = key(0.0, "learning rate at the last step, to which a cosine falls", least=0, most=1e6)
    warmup_epochs: float = key(
        0.0, "epochs in which the learning rate rises from 0 to its highest", least=0, most=MOST_EPOCHS
    )
    weight_decay: float = key(
        0.0, "AdamW's; none for biases, scales, tokens and position embeddings", least=0, most=1e6
    )
    clip_norm: float = key(float("inf"), "bound of the gradient's global norm; inf: none", above=0, infinite=True)
    adaptive_clip: float = key(
        0.0, "bound of each unit's gradient norm relative to its weights'; 0: none", least=0, most=1e6
    )
    layer_decay: float = key(1.0, "factor of the learning rate from each block to the one before it", above=0, most=1)
    rate_factors: tuple[Any, ...] = key(
        (), "entries (pattern of parameter paths, factor of the learning rate), or with the epoch from which they learn"
    )
    decay_factors: tuple[Any, ...] = key((), "entries (pattern of parameter paths, factor of the weight decay)")
    freeze: tuple[str, ...] = key((), "patterns of the paths of parameters that are not trained")
    accumulate: int = key(
        1, "parts into which a batch is divided to save memory; their gradients are averaged", least=1
    )
    save_every: int = key(
        1000, "steps between checkpoints: what a killed run loses at most; a shorter run saves once on the way", least=1
    )

    def __post_init__(self):
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate is {self.accumulate}; it has to divide the batch_size {self.batch_size}")
        for name, lengths in (("rate_factors", (2, 3)), ("decay_factors", (2,))):
            for entry in getattr(self, name):
                listed = isinstance(entry, tuple) and len(entry) in lengths
                if not listed or not isinstance(entry[0], str) or not all(map(_is_factor, entry[1:])):
                    form = "(pattern, factor)" + " or (pattern, factor, epoch)" * (3 in lengths)
                    told = f"{name} has the entry {checked.shown(entry)}"
                    raise InputError(f"{told}; an entry is {form}, as in ('^reducer/', 10.0)")


@dataclasses.dataclass(frozen=True)
class FreshViews(Augmentation):
    """What is done to training images beside data.augment."""

    repeats: int = key(1, "how many views of an image follow each other (repeated augmentation)", least=1, most=1000)


@dataclasses.dataclass(frozen=True)
class NetworkRecipe(Recipe):
    """What stages read that train the whole network."""

    label_smoothing: float = key(0.0, "share of the target that is spread over all classes", least=0, below=1)
    drop_path: float = key(
        0.0,
        "probability that a branch of the last block is skipped (stochastic depth); the first is never",
        least=0,
        below=1,
    )
    ema: float = key(
        0.0,
        "decay per step of a moving average of the parameters, after n steps at most n / (9 + n); 0: none",
        least=0,
        below=1,
    )
    remat: bool = key(
        False, "compute activations inside blocks again for the gradient, which saves memory and takes time"
    )
    augmentation: FreshViews = section(FreshViews)
    mixing: Mixing = section(Mixing)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the state is divided over devices; the batch is divided over all of them."""

    fsdp: int = key(
        1, "devices that parameters, optimiser state and moving average are divided over", least=1, most=MOST_IMAGES
    )
    table: tuple[tuple[str, int], ...] = key(
        (), "entries (pattern of parameter paths, axis that is divided); (): kernels and embeddings"
    )


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_EPOCHS
