"""tif_jax: Vision Transformers made cheaper by finding out which image tokens matter."""

from tif_jax.data.preprocess import preprocess as preprocess
from tif_jax.errors import InputError as InputError
from tif_jax.errors import WorkError as WorkError
from tif_jax.impact.oracle import token_impact as token_impact
from tif_jax.impact.shards import read_impact as read_impact
from tif_jax.models import create_model as create_model
from tif_jax.models.cost import cost as cost
from tif_jax.weights.loading import load as load
