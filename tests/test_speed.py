"""Utilisation and memory in the log, and `tif profile`."""

import json

import jax
import jax.numpy as jnp
import pytest
from trainer import TINY

from tif_jax.__main__ import main
from tif_jax.models import create_model
from tif_jax.models.compiled import planned_memory
from tif_jax.models.cost import cost
from tif_jax.runtime import metrics_log, records
from tif_jax.runtime.mesh import make_mesh
from tif_jax.training import speed

VIT = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, num_classes=3)


def test_utilisation_is_three_forward_passes_over_what_the_devices_can_do():
    model, mesh = create_model(VIT), make_mesh(4)
    found = speed.meter(model, mesh, peak_tflops=2.0)(1000.0)
    operations = 1000 * 3 * 2 * cost(model).gmac * 1e9
    assert found["mfu"] == pytest.approx(operations / (4 * 2e12))
    assert "mfu" not in speed.meter(model, mesh)(1000.0)  # nobody knows what a CPU can do
    assert "mfu" not in speed.meter(None, mesh, peak_tflops=2.0)(1000.0)


def test_memory_is_that_of_the_device_that_holds_most(monkeypatch):
    mesh = make_mesh(2)
    held = dict(zip(mesh.devices.flat, (5, 7), strict=True))
    monkeypatch.setattr(speed, "peak_memory", held.get)
    assert speed.meter(None, mesh)(1.0) == {"memory_bytes": 7}
    monkeypatch.undo()
    assert speed.peak_memory(jax.devices()[0]) is None


def test_profile_measures_and_trains_nothing(tmp_path, capsys):
    command = ["--stage=backbone", *TINY, "--config.peak_tflops=0.1", f"--workdir={tmp_path}"]
    assert main(["profile", "--steps=2", *command]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == records.read(tmp_path / "profile" / "backbone.json")
    assert printed["step_seconds"] > 0 and 0 < printed["mfu"] < 1 and printed["planned_memory_bytes"] > 0
    assert list((tmp_path / "profile" / "backbone").rglob("*.xplane.pb")) and not (tmp_path / "backbone").exists()
    assert main(["profile", "--steps=0", *command]) == 2
    assert main(["profile", *command, "--config.backbone.init_from=x.safetensors"]) == 2
    assert "has no training step" in capsys.readouterr().err

    assert main(["train", *command, "--config.backbone.num_epochs=1.0"]) == 0
    line = metrics_log.read(tmp_path / "backbone")[-1]
    assert {"loss", "grad_norm", "images_per_second", "step_seconds", "data_wait", "mfu"} <= set(line)


def test_planned_memory_counts_what_lies_between():
    """On a CPU XLA's own peak leaves it out."""
    rows = jnp.zeros((1000, 1), jnp.float32)
    program = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0)[0, 0]).lower(rows).compile()
    assert 4e6 <= planned_memory(program) < 20e6
