"""Backbones: what they are, how they are described, what they cost.

    model       what every family has: `embed`, `encode`, `predict`, a reducer
    vit, levit  the families, each with its blocks in vit_blocks, levit_blocks
    pooling     from the tokens left to what the head reads
    names       timm's names -> fields
    build       names or fields -> a model with random weights, which a budget may size
    budget      multiply-adds allowed -> how many tokens a reducer keeps
    speed       the same for images/s, measured on this device
    compiled    the forward pass as one program
    cost        a model -> its multiply-adds, parameters and token counts
    heads       features on the raster of patches -> numbers for every pixel
    grids       tokens left -> features on that raster, whatever the reducer did
    fresh_heads new classification heads on a trained model
    special_alone  the last block, where heads read special tokens alone
    around      a block as another sees it who looks on (`cost`, `trace`, `grids`)
    predictions pictures -> their likeliest classes
    params      a model's weights as nested dicts, and back

A model is described by a dict of fields: plain data that `create_model` takes and checkpoints carry. Its entry `family`
says whose fields they are, 'vit' or 'levit'; without it they are a `ViT`'s.
"""

from tif_jax.models.build import FAMILIES as FAMILIES
from tif_jax.models.build import MODEL_FIELDS as MODEL_FIELDS
from tif_jax.models.build import blueprint as blueprint
from tif_jax.models.build import built_with as built_with
from tif_jax.models.build import check_fields as check_fields
from tif_jax.models.build import check_seed as check_seed
from tif_jax.models.build import create_model as create_model
from tif_jax.models.build import field_kinds as field_kinds
from tif_jax.models.build import grid_of as grid_of
from tif_jax.models.build import with_defaults as with_defaults
from tif_jax.models.levit import LeViT as LeViT
from tif_jax.models.model import Model as Model
from tif_jax.models.model import carried as carried
from tif_jax.models.model import check_images as check_images
from tif_jax.models.model import where_patches_are as where_patches_are
from tif_jax.models.names import model_fields as model_fields
from tif_jax.models.predictions import require_head as require_head
from tif_jax.models.vit import ViT as ViT
from tif_jax.models.vit import plain_vit as plain_vit
