"""What every model family has: three steps, and a reducer between them.

Legend: B images, Y X height and width, T tokens, S tokens left, N patch tokens, D width in, E width out, L classes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from tif_jax import checked
from tif_jax.data.pictures import AnyImage
from tif_jax.data.preprocess import Preprocessing, preprocess
from tif_jax.errors import InputError
from tif_jax.layers import widened
from tif_jax.models.predictions import PredictedMap, Prediction, predict_images, predict_maps
from tif_jax.reducers import Aux, Full, Reducer
from tif_jax.tokens import Tokens, raster_tokens

FULL = Full()
# Normalised images lie within about 3, with noise in place of erased parts within 6; those from 0 to 255 far beyond.
_FAR, _FAR_BEYOND = 20.0, 4.0
_PREPARE = "tif_jax.preprocess(files, model) makes them"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}  # float64: for checks, needs x64


class Model(nnx.Module):
    """A backbone in three steps: `embed`, `encode` and `predict`; calling it takes all three.

    It knows no token-reduction method: `encode` hands the blocks to `reducer`, which owns how tokens travel through them.
    A family (`ViT`, `LeViT`) has `embed` and `predict` of its own, and blocks `block_0`, `block_1`, ... of two half-steps.

    rngs, of every step: None, or the streams that training draws from. With them a model with running statistics
    normalises by those of the batch, and updates its own; without, a call is deterministic and changes nothing.
    """

    image_size: tuple[int, int]  # height and width in pixels
    grid: tuple[int, int]  # rows and columns of the patch raster before the first block
    num_special: int  # class, distillation and register tokens, in front of the patches
    depth: int  # blocks
    dtype: Any  # of the computation; parameters and logits are float32
    task: str = "classification"  # what it predicts: one of `tif_jax.tasks`
    reducer: Reducer
    preprocessing: Preprocessing = Preprocessing()  # of the images that its weights were trained with
    class_names: tuple[str, ...] | None = None  # one per output of the head
    built: str = ""  # the fields and the reducer that it was built with, as JSON (`models.built_with`)
    origin: str = ""  # what its weights were loaded from, where others know it: hf:OWNER/NAME@COMMIT

    @property
    def num_classes(self) -> int:
        """Outputs of the head; 0 without one."""
        return self.head.out_features if hasattr(self, "head") else 0

    @property
    def blocks(self) -> Sequence[Any]:
        return [getattr(self, f"block_{i}") for i in range(self.depth)]

    @property
    def blocks_of_prediction(self) -> Sequence[Any]:
        """The blocks, for who reads no more of what they leave than `predict` does."""
        return self.blocks

    def embed(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Tokens before the first block: the special ones, then the patches in raster order.

        Raises InputError for images of another size than the model's.
        """
        raise NotImplementedError

    def encode(
        self,
        x: Float[Array, "B T D"],
        rngs: nnx.Rngs | None = None,
        *,
        blocks: Sequence[Any] | None = None,
        reducer: Reducer | None = None,
    ) -> tuple[Float[Array, "B S E"], Aux]:
        """The tokens after the last block, as the reducer left them, and its side channel.

        blocks, reducer: others in place of the model's own.
        """
        blocks = self.blocks if blocks is None else blocks
        return (self.reducer if reducer is None else reducer)(blocks, x, self.tokens(x.shape[0]), rngs)

    def predict(
        self,
        x: Float[Array, "B S E"],
        aux: Aux,
        patch_weight: Float[Array, "B N"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B *prediction"], Aux]:
        """Class logits, at least float32, and aux with the logits of each head (`logits/...`), if there are several.

        patch_weight: each patch token's share where patches are averaged (the oracle's gates).
        """
        raise NotImplementedError

    def __call__(
        self, images: Float[Array | np.ndarray, "B Y X 3"], rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "B *prediction"], Aux]:
        """The prediction and the reducer's side channel. Class logits (B, L), without a head the pooled features; of a dense
        task depth in metres (B, Y, X), or class logits of every pixel (B, Y, X, L).
        """
        x, aux = self.encode(self.embed(images, rngs), rngs, blocks=self.blocks_of_prediction)
        return self.predict(x, aux, rngs=rngs)

    def preprocess(self, images: Iterable[AnyImage]) -> Float32[Array, "B Y X 3"]:
        """Pictures (paths, bytes of files, uint8 arrays, PIL images) as this model takes them (`tif_jax.preprocess`)."""
        return preprocess(images, self)

    def predict_images(self, files: Iterable[AnyImage] | AnyImage, top: int = 5) -> list[Prediction]:
        """The likeliest classes of pictures and of those in folders, with names (`tif_jax.predict_images`)."""
        return predict_images(self, files, top)

    def predict_maps(self, files: Iterable[AnyImage] | AnyImage) -> list[PredictedMap]:
        """Of a depth or segmentation model: metres, or the class, of each pixel of pictures (`tif_jax.predict_maps`)."""
        return predict_maps(self, files)

    def tokens(self, num_images: int) -> Tokens:
        """What the rows of `embed`'s output are."""
        return raster_tokens(
            num_images, self.num_special, self.grid, hasattr(self, "class_token"), widened(jnp.dtype(self.dtype))
        )


def carried(model: Model) -> dict[str, Any]:
    """What a model carries beside its weights, as JSON has it: `preprocessing` and `class_names`."""
    names = model.class_names
    return {"preprocessing": checked.to_json(vars(model.preprocessing)), "class_names": names and list(names)}


def where_patches_are(aux: Aux) -> Aux:
    """What others are told of the tokens: `kept`, else `source`, else nothing."""
    return next(({name: aux[name]} for name in ("kept", "source") if name in aux), {})


def check_images(model: Model, images: Any) -> None:
    """Raises InputError for what is no batch of normalised images of the model's size.

    Numbers are looked at where there are any: not while JAX traces a function.
    """
    shape, (height, width) = getattr(images, "shape", None), model.image_size
    if shape is None or len(shape) != 4 or shape[1:] != (height, width, 3):
        said = f"have shape {shape}" if shape is not None else f"are a {type(images).__name__}"
        raise InputError(f"images {said}; this model takes (B, {height}, {width}, 3); {_PREPARE}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images are {images.dtype}; this model takes normalised floats; {_PREPARE}")
    if isinstance(images, jax.core.Tracer) or not getattr(images, "is_fully_addressable", True):
        return
    on = jnp if isinstance(images, jax.Array) else np  # where the images are
    with jax.ensure_compile_time_eval():  # of a function that is traced they may be a constant
        # No array of magnitudes: it would take longer than to look twice.
        largest = float(on.maximum(images.max(initial=0), -images.min(initial=0)))
    if not largest <= max(_FAR, _FAR_BEYOND * _largest(model.preprocessing)):
        raise InputError(f"images have values up to {largest:g}, which is not normalised; {_PREPARE}")


def _largest(how: Preprocessing) -> float:
    """The largest magnitude of a normalised image."""
    return max(max(mean, 1 - mean) / std for mean, std in zip(how.mean, how.std, strict=True))


def dtype_name(dtype: Any) -> str:
    """The name of a dtype to compute in, given as a name or as jnp.bfloat16. InputError where models do not compute in it."""
    try:
        name = dtype if isinstance(dtype, str) or dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed: {', '.join(map(repr, DTYPES))}")
    return name


def dtype_named(dtype: Any) -> Any:
    """The dtype to compute in (`dtype_name`)."""
    return DTYPES[dtype_name(dtype)]


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Of an image size, which is a square's if it is one number."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def token_embedding(rngs: nnx.Rngs, num_tokens: int, width: int) -> nnx.Param:
    """A learned vector for each of some tokens, (1, num_tokens, width)."""
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), (1, num_tokens, width), jnp.float32))
