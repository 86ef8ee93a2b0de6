"""The last block of a classifier that reads special tokens alone.

Legend: B images, T tokens, D width.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from tif_jax.models.around import Around
from tif_jax.tokens import QueryKey, Tokens, join, split


@dataclass(frozen=True)
class SpecialAlone(Around):
    """A block of which only the first `number` rows, special tokens, are read afterwards.

    They come out as from the block. The others pass through as they are, so that a reducer can keep its books; they are keys
    and values. What attention compared is that of all rows.
    """

    number: int

    def attend(
        self, x: Float[Array, "B T D"], tokens: Tokens, *args, maps: Any = None, **kwargs
    ) -> tuple[Float[Array, "B T D"], QueryKey | None]:
        if maps is None:
            first, qk = self.block.attend_first(self.number, x, tokens, *args, **kwargs)
        else:  # attention is there already
            y, qk = self.block.attend(x, tokens, *args, maps=maps, **kwargs)
            first = y[:, : self.number]
        return join(first, x[:, self.number :]), qk

    def feed_forward(self, x: Float[Array, "B T D"], *args, **kwargs) -> Float[Array, "B T D"]:
        first, others = split(x, self.number)
        return join(self.block.feed_forward(first, *args, **kwargs), others)
