"""The tables of a report, from rows written by hand."""

import json
import math

import numpy as np
from small_project import forget_handlers

from tif_jax.commands import _report, _results
from tif_jax.commands._tables import fixed, percent
from tif_jax.figures.plots import accuracy_cost
from tif_jax.runtime import metrics_log, records


def row(label, seed, top1, before, **others):
    return {
        "reducer": label.partition("-")[0], "label": label, "keep_ratio": None, "tokens_left": 41, "seed": seed,
        "num_images": 9, "gmac": 0.731, "images_per_second": 100.0, "top1": top1, "top1_before": before,
        "directory": f"finetune/{label}-{seed}", **others,
    }  # fmt: skip


FULL = dict(keep_ratio=1.0, tokens_left=196, gmac=1.254, images_per_second=50.0)
ROWS = [row("full-1", seed, 0.8 + seed / 100, 0.75, **FULL) for seed in (0, 1)] + [
    row("tome-13", seed, 0.7, 0.6 + seed / 100) for seed in (0, 1)
]


RESULT = {
    "command": "tif run --config a|b", "begun": "2026-01-01", "date": "2026-01-02", "versions": {"jax": "1.2"},
    "device": "2 x cpu",
    "machine": {"host": "here", "processor": "Z80", "cores": 2, "system": ""}, "speed": {},
    "taken_from": {"/old": ["backbone", "impact"]},
    "test": {"num_images": 9, "data": {"name": "image_folder", "root": "/data/birds", "test_split": "val"}},
    "backbone": {"top1": 0.8}, "rankings": None, "best": None, "best_chosen_on": None, "left_out": [], "unfinished": [],
}  # fmt: skip


def test_the_heading_says_what_was_run_on_what_where_and_when():
    text = table(ROWS, unfinished=["finetune/x-0"])
    for cells in (
        "data | image_folder `birds` (`val`), 9 test images", r"command | `tif run --config a\|b`",
        "begun | 2026-01-01", "reported | 2026-01-02", "machine | 2 x cpu on Z80, 2 cores, here", "software | jax 1.2",
        "taken over | backbone, impact from `/old`",
    ):  # fmt: skip
        assert f"| {cells} |" in text
    measured = {"host": "there", "processor": "6502", "cores": 4, "device": "2 x cpu"}
    assert "| machine | 2 x cpu on 6502, 4 cores, there |" in table(ROWS, speed=measured)
    assert "Not finished, or not evaluated: `finetune/x-0`." in text
    assert "png" not in text and "![training curves](training.png)" in _report.markdown_of(RESULT, [], ["training.png"])
    assert "Nothing is fine-tuned yet" in table([])


def table(rows, **others):
    summary = _results.summarise(rows)
    result = RESULT | {"rows": rows, **others}
    return _report.markdown_of(result, summary)


def test_a_spread_stands_where_seeds_differ_alone():
    text = table(ROWS)
    assert "| full-1 | 75.00 | 80.50 ± 0.71 | 196 | 1.2540 | 50.0 | 1.00 |" in text
    assert "| tome-13 | 60.50 ± 0.71 | 70.00 | 41 | 0.7310 | 100.0 | 2.00 |" in text
    one = table(ROWS[::2])
    assert "±" not in one and "one seed" in one


def test_speed_is_beside_the_full_model_or_beside_nothing():
    assert "x full" not in table(ROWS[2:])
    later = row("evit-0.5", 0, 0.7, 0.6, images_per_second=None)  # of a config that has been changed since
    assert "| evit-0.5 | 60.00 | 70.00 | 41 | 0.7310 | - | - |" in table([*ROWS[::2], later])


def test_what_has_no_row_is_told(tmp_path, caplog):
    forget_handlers()
    for name in ("full-1-0", "full-1-1", "full-1-2"):
        (tmp_path / "finetune" / name).mkdir(parents=True)
        (tmp_path / "finetune" / name / "metrics.json").write_text("{}")
    left_out = _results._left_out(tmp_path, ["finetune/full-1-0"])
    assert left_out == ["finetune/full-1-1", "finetune/full-1-2"]
    assert "finetune/full-1-1, finetune/full-1-2" in caplog.text
    assert "`finetune/full-1-1`, `finetune/full-1-2`" in table(ROWS[:1], left_out=left_out)
    assert not _results._left_out(tmp_path, [f"finetune/full-1-{seed}" for seed in range(3)])


def test_json_that_every_reader_takes(tmp_path):
    """RFC 8259 has no NaN and no Infinity, which Python writes and jq, browsers and most other programs refuse."""
    data = {"auc": math.nan, "rows": [{"loss": math.inf}, {"loss": np.float64(-math.inf)}], "tuple": (0.5, math.nan)}
    records.write(tmp_path / "metrics.json", data)
    metrics_log.MetricsLog(tmp_path, 0).write(1, {"loss": 0.5, "auc": math.nan})

    def refuse(constant):
        raise ValueError(constant)

    texts = [(tmp_path / "metrics.json").read_text(), *(tmp_path / "metrics.jsonl").read_text().splitlines()]
    read, line = (json.loads(text, parse_constant=refuse) for text in texts)
    assert read["auc"] is read["rows"][0]["loss"] is read["rows"][1]["loss"] is line["auc"] is None
    assert records.read(tmp_path / "metrics.json") == {
        "auc": None, "rows": [{"loss": None}, {"loss": None}], "tuple": [0.5, None]
    }  # fmt: skip
    assert metrics_log.read(tmp_path) == [{"step": 1, "loss": 0.5, "auc": None}]


def test_numbers_that_are_not_there(tmp_path):
    assert fixed(3)(None) == fixed(3)(math.nan) == "-" and fixed(1, 100.0)(0.5) == "50.0"
    assert percent((0.861, 0.0061)) == "86.10 ± 0.61" and percent((0.861, None)) == "86.10"
    accuracy_cost(_results.summarise(ROWS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
