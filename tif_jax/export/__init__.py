"""Models as files that run without this package: StableHLO, ONNX, and the backbone for timm."""

from tif_jax.export.onnx import to_onnx as to_onnx
from tif_jax.export.stablehlo import to_stablehlo as to_stablehlo
from tif_jax.export.timm import to_timm as to_timm

FORMATS = {"stablehlo": to_stablehlo, "onnx": to_onnx, "timm": to_timm}
