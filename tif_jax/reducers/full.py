"""No reduction: every token goes through every block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Full:
    walks_pyramids = True

    def __call__(self, blocks, x, tokens, rngs=None):
        for block in blocks:
            x, _ = block(x, tokens, rngs=rngs)
        return x, {}
