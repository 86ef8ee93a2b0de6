"""Small files of a run: sealed records, claims, the metrics log."""

import json

import pytest

from tif_jax.errors import InputError
from tif_jax.runtime import metrics_log, records


def test_metrics_log_is_appended_to_and_the_last_line_of_a_step_counts(tmp_path, caplog):
    path, log = tmp_path / "metrics.jsonl", metrics_log.MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    before = path.read_bytes() + b'{"step": 4, "lo'
    path.write_bytes(before)  # killed while writing
    metrics_log.MetricsLog(tmp_path, 2).write(3, {"loss": 9.0})
    assert path.read_bytes().startswith(before)
    assert metrics_log.read(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]
    assert not caplog.records
    path.write_bytes(path.read_bytes().replace(b'"loss": 0.5', b'"loss": 0.6'))
    assert [line["step"] for line in metrics_log.read(tmp_path)] == [1, 3] and "line 2 is damaged" in caplog.text
    metrics_log.MetricsLog(tmp_path, 0).write(1, {"loss": 2.0})  # begun anew
    assert metrics_log.read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_folder_knows_what_it_was_claimed_for(tmp_path):
    recipe = {"rate": 0.1, "ema": 0.0, "clip": float("inf"), "save_every": 1000, "distillation": {"kind": "soft"}}
    records.claim(tmp_path, {"recipe": recipe, "model": {"width": 8, "sizes": (1, 2), "remat": True}})
    now = {"recipe": recipe | {"save_every": 5}, "model": {"width": 8, "sizes": (1, 2)}}
    ignored = ("save_every", "remat")
    records.claim(tmp_path, now, ignored=ignored)
    for key, value, told in [
        ("ema", 0.9, r"recipe\.ema 0\.0, not 0\.9"),
        ("rate", 0.2, r"recipe\.rate 0\.1, not 0\.2"),
        ("distillation", {"kind": "hard"}, r"recipe\.distillation\.kind 'soft', not 'hard'"),
        ("warmup", 5, r"recipe\.warmup None, not 5"),
    ]:
        with pytest.raises(InputError, match=told):
            records.claim(tmp_path, now | {"recipe": recipe | {key: value}}, ignored=ignored)


def test_a_record_that_was_changed_is_noticed(tmp_path):
    path = tmp_path / "metrics.json"
    records.write(path, {"top1": 0.5, "rows": [{"gmac": 1}], "loss": float("nan"), "by_step": {1: 2}})
    written = path.read_text()
    assert records.read(path) == {"top1": 0.5, "rows": [{"gmac": 1}], "loss": None, "by_step": {"1": 2}}
    path.write_text(json.dumps(dict(reversed(json.loads(written).items()))))  # neither order nor spaces count
    assert records.read(path)["top1"] == 0.5
    for old, new, told in [
        ("0.5", "0.6", "does not have the sha256"), ("top1", "top2", "does not have the sha256"),
        ('"sha256"', '"sha255"', "an earlier version wrote it"), ("null", "nul", "Expecting value"),
        (written, "[]", "no sha256"),
    ]:  # fmt: skip
        path.write_text(written.replace(old, new))
        with pytest.raises(InputError, match=rf"metrics\.json is damaged \(.*{told}"):
            records.read(path)
