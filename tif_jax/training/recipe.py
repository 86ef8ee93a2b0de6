"""The keys that every config has, and what they are where it leaves them out: `--config.KEY=VALUE` can set each."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from tif_jax.data.augment import Augmentation
from tif_jax.errors import InputError
from tif_jax.training.mixing import Mixing

TOP: dict[str, Any] = dict(
    peak_tflops=0.0,  # of one device, to tell model FLOP/s utilisation by; 0: known for some devices (speed.py)
    # Parameters, optimiser state and moving average are divided over `fsdp` devices, as a table of (pattern, axis) says.
    sharding=dict(fsdp=1, table=()),  # (): state.FSDP
)

# Of the sections that train.
TRAINING: dict[str, Any] = dict(
    learning_rate=1e-3,  # at its peak
    final_learning_rate=0.0,
    warmup_epochs=0.0,
    weight_decay=0.0,
    clip_norm=float("inf"),
    adaptive_clip=0.0,
    layer_decay=1.0,
    rate_factors=(),  # (pattern, factor), or (pattern, factor, epoch): nothing is learned before that epoch
    decay_factors=(),  # (pattern, factor)
    freeze=(),  # patterns of parameters that rest; batch normalisation still normalises by the batch
    accumulate=1,  # parts that a batch is worked through in
    save_every=1000,  # steps that a killed run loses at most; a shorter run saves once on the way
)

# Of those that train the whole network.
NETWORK: dict[str, Any] = TRAINING | dict(
    label_smoothing=0.0,
    drop_path=0.0,
    ema=0.0,  # decay per step of a moving average of the parameters; 0: none
    remat=False,  # activations inside blocks are computed again instead of kept
    augmentation=dict(rand_augment="", color_jitter=0.0, erase=0.0, repeats=1),  # beside data.augment
    mixing=dict(mixup=0.0, cutmix=0.0, switch=0.5, probability=1.0),
)

FINETUNE: dict[str, Any] = NETWORK | dict(
    phases=(),
    # teacher: a checkpoint or weight file; '': the backbone
    distillation=dict(kind="", teacher="", logits_weight=0.5, tokens_weight=0.5),
)


# Those that change how long something takes, or where it is, but not what comes out.
WITHOUT_EFFECT = ("save_every", "remat", "num_workers", "worker_processes")

_OWN = {  # keys without a default here
    "backbone": ("init_from", "model", "num_heads", "num_classes", "num_epochs", "batch_size"),
    "filter": ("labels", "rho", "balance", "num_epochs", "batch_size"),
    "adapter": ("num_epochs", "batch_size"),
    "finetune": ("model", "num_epochs", "batch_size"),
}


def fill_in(config: ConfigDict) -> None:
    """Adds the keys that a config leaves out. Raises InputError for keys that nothing reads."""
    with config.unlocked():
        _fill(config, TOP, "")
        if "data" in config and "worker_processes" not in config.data:
            config.data.worker_processes = 0
        for name, defaults in dict(backbone=NETWORK, filter=TRAINING, adapter=TRAINING, finetune=FINETUNE).items():
            section = config.get(name, ConfigDict())
            known = (*defaults, *_OWN[name])
            if unknown := sorted(set(section) - set(known)):
                near = difflib.get_close_matches(unknown[0], known, 1, cutoff=0.0)[0]
                raise InputError(f"{name} has {', '.join(unknown)}, which nothing reads; did you mean {near!r}?")
            if "num_epochs" in section:  # an imported backbone is not trained
                _fill(section, defaults, f"{name}.")


def _fill(section: ConfigDict, defaults: dict[str, Any], prefix: str) -> None:
    for key, value in defaults.items():
        if not isinstance(value, dict):
            if key not in section:
                section[key] = value
            continue
        given = section.get(key, ConfigDict())
        if not isinstance(given, ConfigDict):
            raise InputError(f"{prefix}{key} is {given!r}; it is a dict of {', '.join(value)}")
        if unknown := sorted(set(given) - set(value)):
            raise InputError(f"{prefix}{key} has {', '.join(unknown)}; known: {', '.join(value)}")
        section[key] = ConfigDict(value | given.to_dict())


_RANGES = (  # key, least, and what it is below
    ("learning_rate", 0, float("inf")), ("final_learning_rate", 0, float("inf")), ("weight_decay", 0, float("inf")),
    ("adaptive_clip", 0, float("inf")), ("label_smoothing", 0, 1), ("drop_path", 0, 1), ("ema", 0, 1),
)  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises InputError for values of the sections that train, before hours of work come to them."""
    if config.peak_tflops < 0:
        raise InputError(
            f"peak_tflops is {config.peak_tflops}; at least 0, which stands for what is known of the device"
        )
    for name in ("backbone", "filter", "adapter", "finetune"):
        if config.get(name, {}).get("num_epochs"):
            try:
                _check(config[name])
            except InputError as error:
                raise InputError(f"{name}: {error}") from None


def augmentation(section: ConfigDict) -> tuple[Augmentation, int]:
    """How fresh views are augmented, and how many of an image follow each other."""
    settings = section.augmentation.to_dict()
    repeats = settings.pop("repeats")
    return Augmentation(**settings), repeats


def mixing(section: ConfigDict) -> Mixing | None:
    """How batches are mixed, if they are."""
    found = Mixing(**section.mixing.to_dict()) if "mixing" in section else Mixing()
    return found if found.mixup or found.cutmix else None


def _check(section: ConfigDict) -> None:
    mixing(section)
    if "augmentation" in section and augmentation(section)[1] < 1:
        raise InputError(f"augmentation.repeats is {section.augmentation.repeats}; at least 1")
    if section.accumulate < 1 or section.batch_size % section.accumulate:
        raise InputError(f"accumulate is {section.accumulate}; it has to divide the batch_size {section.batch_size}")
    for name, least, below in _RANGES:
        if not least <= section.get(name, least) < below:
            raise InputError(f"{name} is {section[name]}; allowed: from {least:g}, below {below:g}")
    if not section.clip_norm > 0:
        raise InputError(f"clip_norm is {section.clip_norm}; it is above 0, inf for none")
    if section.save_every < 1:
        raise InputError(f"save_every is {section.save_every}; it is a number of steps, at least 1")
    for name, lengths in (("rate_factors", (2, 3)), ("decay_factors", (2,))):
        for entry in section[name]:
            listed = isinstance(entry, tuple | list) and len(entry) in lengths
            if not listed or not isinstance(entry[0], str) or not all(isinstance(x, int | float) for x in entry[1:]):
                form = "(pattern, factor)" + " or (pattern, factor, epoch)" * (3 in lengths)
                raise InputError(f"{name} has the entry {entry!r}; an entry is {form}, as in ('^reducer/', 10.0)")
    if "distillation" in section and (kind := section.distillation.kind) not in ("", "soft", "hard"):
        raise InputError(f"distillation.kind is {kind!r}; allowed: '', 'soft', 'hard'")
    if isinstance(section.freeze, str):
        raise InputError(f"freeze is {section.freeze!r}; it is a tuple of patterns, as in ({section.freeze!r},)")
