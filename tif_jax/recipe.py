"""The keys that every config has, and what they are where it leaves them out: `--config.KEY=VALUE` can set each."""

from typing import Any

from ml_collections import ConfigDict

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
    """Adds the keys that a config leaves out."""
    _fill(config, TOP)
    for section, defaults in dict(backbone=NETWORK, filter=TRAINING, finetune=FINETUNE).items():
        if "num_epochs" in config.get(section, ()):  # an imported backbone is not trained
            _fill(config[section], defaults)


def _fill(section: ConfigDict, defaults: dict[str, Any]) -> None:
    for key, value in defaults.items():
        if isinstance(value, dict):
            if key not in section:
                section[key] = ConfigDict()
            _fill(section[key], value)
        elif key not in section:
            section[key] = value
