"""A block as another sees it who looks on: reducers can not tell it from the block."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Around:
    """Passes everything on to a block. Subclasses do something at one of its two half-steps."""

    block: Any

    def __getattr__(self, name: str):
        return getattr(self.block, name)  # what a reducer asks, of a shrink block its stride

    def attend(self, x, tokens, *args, **kwargs):
        return self.block.attend(x, tokens, *args, **kwargs)

    def feed_forward(self, x, *args, **kwargs):
        return self.block.feed_forward(x, *args, **kwargs)

    def __call__(self, x, tokens, key_log_weight=None, rngs=None):
        x, qk = self.attend(x, tokens, key_log_weight, rngs)
        return self.feed_forward(x, rngs), qk
