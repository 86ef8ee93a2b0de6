"""The keys that every config has, and what they are where it leaves them out: `--config.KEY=VALUE` can set each."""

from typing import Any

from ml_collections import ConfigDict

from tif_jax.data.augment import Augmentation
from tif_jax.errors import InputError
from tif_jax.mixing import Mixing

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
    freeze=(),  # patterns of parameters that rest
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


def fill_in(config: ConfigDict) -> None:
    """Adds the keys that a config leaves out. Raises InputError for keys that a dict among these values does not have."""
    _fill(config, TOP, "")
    for section, defaults in dict(backbone=NETWORK, filter=TRAINING, finetune=FINETUNE).items():
        if "num_epochs" in config.get(section, ()):  # an imported backbone is not trained
            _fill(config[section], defaults, f"{section}.")


def _fill(section: ConfigDict, defaults: dict[str, Any], prefix: str) -> None:
    for key, value in defaults.items():
        if not isinstance(value, dict):
            if key not in section:
                section[key] = value
            continue
        given = section.get(key, ConfigDict())
        if unknown := sorted(set(given) - set(value)):
            raise InputError(f"{prefix}{key} has {', '.join(unknown)}; known: {', '.join(value)}")
        section[key] = ConfigDict(value | given.to_dict())


def check(config: ConfigDict) -> None:
    """Raises InputError for values of the sections that train, before hours of work come to them."""
    for name in ("backbone", "filter", "finetune"):
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
    if section.save_every < 1:
        raise InputError(f"save_every is {section.save_every}; it is a number of steps, at least 1")
    if not 0 <= (ema := section.get("ema", 0.0)) < 1:
        raise InputError(f"ema is {ema}; it is a decay in [0, 1), 0 for none")
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
