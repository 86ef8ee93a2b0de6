"""tif_jax: Vision Transformers made cheaper by finding out which image tokens matter."""
