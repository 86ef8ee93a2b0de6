"""A finished run in which something was changed: run again it is repaired, refused in one line, or it did not matter.

No number changes.
"""

import collections
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from small_project import contents, forget_handlers, last_line, prepare, tif

from tif_jax.commands import _report, benchmark, evaluate
from tif_jax.experiment import config
from tif_jax.runtime import records, workdir

NUM = 200
# Of these in the normal suite: a part, a result, a claim, the benchmark, a checkpoint's config. Before files were sealed,
# 16 changed the report; 28 and 100 ended in a trace.
SHORT = (6, 16, 27, 45, 85)
KINDS = {  # patterns of the files of a run
    "newest checkpoint": "**/checkpoints/{10,2}/**/*",
    "its config": "**/checkpoints/{10,2}/config/metadata",
    "older checkpoint": "**/checkpoints/{5,1}/**/*",
    "claim": "**/config.json",
    "metrics": "**/metrics.json",
    "log": "**/metrics.jsonl",
    "part": "*/part-*.parquet",
    "part's digest": "*/part-*.json",
    "manifest": "*/manifest.json",
    "benchmark": "benchmark.json",
    "report": "report.json",
    "page": "report.md",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, which `tif run` has gone through again."""
    folder = prepare(tmp_path_factory.mktemp("corruption"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
        assert tif("run") == 0
    forget_handlers()
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of `finished` as the current folder: free to damage. Reports come without figures, which take seconds."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "_SECONDS_PER_ROUND", 0.02)
    for figure in ("accuracy_cost", "training_curves", "picture_page"):
        monkeypatch.setattr(_report, figure, lambda *_: None)
    yield tmp_path
    forget_handlers()


def files_of(folder: Path, kind: str) -> list[Path]:
    before, _, rest = KINDS[kind].partition("{")
    names, _, after = rest.partition("}")
    patterns = [f"{before}{name}{after}" for name in names.split(",")]
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def another_digit(data: bytes, rng: random.Random) -> bytes:
    place = rng.choice([match.start() for match in re.finditer(rb"\d", data)])
    digit = rng.choice([d for d in b"0123456789" if d != data[place]])
    return data[:place] + bytes([digit]) + data[place + 1 :]


def corrupt(run: Path, number: int) -> str:
    """Changes one thing in the run's folder; says what."""
    rng = random.Random(number)
    kind = list(KINDS)[number % len(KINDS)]
    files = [path for path in files_of(run, kind) if path.stat().st_size]
    path = rng.choice(files)
    is_text = path.suffix in (".json", ".jsonl", ".md") or path.name == "metadata"
    others = [other for other in files if other.name == path.name and other != path]
    ways = ["flip", "cut", "delete", *["digit"] * 2 * is_text, *["swap"] * bool(others)]
    way = rng.choice(ways)
    if way == "delete":
        path.unlink()
    elif way == "swap":
        other = rng.choice(others)
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
    else:
        change = {"flip": flipped, "cut": cut, "digit": another_digit}[way]
        path.write_bytes(change(path.read_bytes(), rng))
    return f"{kind}: {way} {path.relative_to(run)}"


def numbers(run: Path) -> dict[str, object]:
    """All that is said in results, without speeds and dates."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if "per_second" not in k and k not in ("sha256", "date")}
        return [plain(v) for v in value] if isinstance(value, list) else value

    results = [*run.rglob("metrics.json"), run / "benchmark.json", run / "report.json"]
    return {str(path.relative_to(run)): plain(json.loads(path.read_bytes())) for path in results}


def judged(place: Path, finished: Path, number: int, capsys) -> tuple[str, str]:
    """What was changed, and what became of it."""
    run, expected = place / "run", numbers(finished / "run")
    what = corrupt(run, number)
    capsys.readouterr()
    status = tif("run")
    if status == 2:
        return what, f"refused: {last_line(capsys)}"
    log = capsys.readouterr().err
    assert status == 0, (what, log)
    assert numbers(run) == expected, (what, log)
    told = [line for line in log.splitlines() if re.search("damaged|again|made from", line)]
    return what, f"repaired: {told[0]}" if told else "harmless"


@pytest.mark.parametrize("number", SHORT)
def test_no_number_changes(place, finished, capsys, number):
    judged(place, finished, number, capsys)


@pytest.mark.long
def test_no_number_changes_by_any_of_many_corruptions(place, finished, capsys):
    table = collections.defaultdict(collections.Counter)
    for number in range(NUM):
        shutil.rmtree(place / "run")
        shutil.copytree(finished / "run", place / "run")
        what, outcome = judged(place, finished, number, capsys)
        table[what.partition(":")[0]][outcome.partition(":")[0]] += 1
        with capsys.disabled():
            print(f"\n{number} {what}: {outcome[:250]}", end="")
    with capsys.disabled():
        for kind, outcomes in table.items():
            print(f"\n{kind}: {dict(outcomes)}", end="")


def unfinished(folder: Path, keep: str) -> None:
    """The stage as it stood at an earlier step."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and checkpoint.name != keep:
            shutil.rmtree(checkpoint)


def test_a_look_at_an_unfinished_fine_tuning_does_not_stay_in_the_report(place, finished, capsys):
    folder, metrics = place / "run" / "finetune" / "full-1-0", "run/finetune/full-1-0/metrics.json"
    expected = numbers(finished / "run")
    unfinished(folder, "1")
    with workdir.only_run(place / "run"):  # somebody trains on
        assert tif("evaluate --config.reducer.name=full") == 0
    said = capsys.readouterr()
    looked = json.loads(said.out)
    assert (looked["checkpoint"]["step"], looked["checkpoint"]["of"]) == (1, 2) and "step 1 of 2" in said.err
    assert json.loads((place / metrics).read_bytes())["loss"] == looked["loss"]
    assert looked["loss"] != expected["finetune/full-1-0/metrics.json"]["loss"]
    assert tif("run") == 0
    assert f"{metrics} was made from something else and is made again" in capsys.readouterr().err
    assert numbers(place / "run") == expected


def test_no_stage_begins_with_an_unfinished_one(place, capsys):
    unfinished(place / "run" / "backbone", "5")
    before = contents(place)
    for line in ("score", "train --stage=filter", "train --stage=finetune --config.reducer.name=full"):
        assert tif(line) == 2
        said = last_line(capsys)
        assert "run/backbone stands at step 5 of 10: finish that stage first" in said
    unfinished(place / "run" / "filter", "1")
    assert tif("train --stage=backbone") == 0
    capsys.readouterr()
    for line in ("train --stage=finetune", "evaluate"):
        assert tif(line) == 2
        assert "run/filter stands at step 1 of 2" in last_line(capsys)
    after = contents(place)
    assert all(after[path] == before[path] for path in before if path.name == "metrics.json")


def test_what_was_made_from_another_backbone_is_refused_or_made_again(place, capsys):
    run, other = place / "run", " --config.backbone.learning_rate=0.01"
    shutil.rmtree(run / "backbone")
    assert tif("train --stage=backbone" + other) == 0
    capsys.readouterr()
    assert tif("train --stage=filter" + other) == 2
    assert "run/impact does not match: backbone is" in last_line(capsys)
    shutil.rmtree(run / "impact")
    assert tif("score" + other) == 0
    capsys.readouterr()
    for stage in ("filter", "finetune --config.reducer.name=full"):
        assert tif(f"train --stage={stage}{other}") == 2
        line = last_line(capsys)
        assert (
            "was made with another made_from.backbone, which has changed since" in line and "delete that folder" in line
        )
    assert not benchmark.is_measured(config.load("config.py"), run)
    assert "benchmark.json was made from something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag, same",
    [("data.num_workers=1", True), ("data.test_split=train.csv", False), ("data.num_test=4", False),
     ("data.crop_fraction=0.9", False), ("dtype=bfloat16", False)],
)  # fmt: skip
def test_other_data_are_measured_anew(tmp_path, monkeypatch, caplog, flag, same):
    monkeypatch.chdir(prepare(tmp_path))
    before, now = (evaluate.settings_of(config.load("config.py", f)) for f in ([], [f"--config.{flag}"]))
    records.write(tmp_path / "metrics.json", {"loss": 1.0, "settings": before})
    found = records.read_result(tmp_path / "metrics.json", {"settings": now})
    assert (found is not None) == same
    assert ("metrics.json was made from something else and is made again" in caplog.text) != same
