"""What `tif --help` says. It imports no command, which would bring JAX: that takes seconds."""

import textwrap
from pathlib import Path

from tif_jax.experiment.packaged import first_line

WIDTH = 110
_FOLDER = Path(__file__).parent
_USAGE = """\
usage: tif COMMAND ...
of an experiment (run, train, score, evaluate, benchmark, profile):
       tif COMMAND --config NAME|FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR
"""
_EXAMPLES = """\
examples:
  tif run --config digits --workdir runs/quick --config.quick=true    the whole pipeline in minutes; no download
  tif run --config digits --workdir runs/half --config.reducer.keep_ratio=0.5
  tif run --config folder --config.data.root=PHOTOS --config.backbone.init_from=WEIGHTS --workdir runs/mine
  tif run --config imagenette:plain --workdir runs/plain              needs Imagenette and DeiT-Ti in $TIF_DATA
  tif evaluate --config digits --workdir runs/half --config.reducer.keep_ratio=0.5
  tif convert deit_tiny.pth deit_tiny.safetensors                     weights, without PyTorch
  tif estimate --config imagenet:deit_small --device v5e --count 8 --num-images 1281167,50000    what it would cost
  tif status runs/half                                                how far it is, and how long still
  tif report runs/quick runs/half --output comparison                 runs side by side
  tif predict --workdir runs/mine photos --top 3                      classes of your pictures
  tif compare --weights deit_tiny.safetensors --images photos --out compared    reducers side by side
  tif calibrate --weights deit_tiny.safetensors --images photos --budget 0.4 --budget 0.6 --out schedules
  tif ladder --weights deit_tiny.safetensors --images others --reducer schedules --agreement 0.95 --out ladder.json
  tif serve --workdir runs/mine --port 8000                           answers pictures over HTTP
  tif view --weights deit_tiny.safetensors cat.jpg                    what the model sees: impact, tokens, classes
  tif share --workdir runs/half --to shared                           the model with its card, for others
  tif export --workdir runs/half --to onnx                            a file that runs without this program

`tif help COMMAND` lists the flags of a command, `tif help config` the configs and their keys, `tif help
config data` those of one section, `tif help reducers` the reducers and their options. `tif --version` tells the
version."""


def usage(commands: list[str]) -> str:
    return "\n".join(
        [
            _USAGE,
            *(wrapped(f"  {name:<10} {first_line(_FOLDER / f'{name}.py')}", " " * 13) for name in commands),
            "",
            _EXAMPLES,
        ]
    )


def wrapped(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
