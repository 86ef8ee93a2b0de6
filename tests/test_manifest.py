"""The manifest of impact shards: written once, and told from another by the entries that differ."""

import errno
import json
import logging
import os
import threading

import pytest
from small_shards import error_numbered, manifest, one_line, write_all

from tif_jax.errors import InputError
from tif_jax.impact.manifest import open_manifest
from tif_jax.impact.shards import read_impact
from tif_jax.runtime import records


@pytest.fixture
def workdir(tmp_path):
    write_all(tmp_path)
    return tmp_path


def test_the_manifest_is_written_once_and_then_verified(workdir):
    path = workdir / "impact" / "manifest.json"
    before = path.stat()
    open_manifest(workdir / "impact", manifest())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    stored = json.loads(path.read_text())
    assert stored.pop("format_version") == 2 and len(stored.pop("sha256")) == 64
    assert stored == manifest(image_size=[64, 64])


def test_another_manifest_is_refused_by_the_keys_that_differ(workdir):
    before = (workdir / "impact" / "manifest.json").read_bytes()
    other = manifest(estimator={"name": "sampled", "num_samples": 32}, mask="zero", versions={"jax": "0.12.0"})
    with pytest.raises(InputError) as error:
        open_manifest(workdir / "impact", other)
    text = one_line(error)
    assert "estimator.num_samples is 16 there, 32 here" in text and "mask is 'drop' there, 'zero' here" in text
    assert "--workdir" in text and "delete" in text
    assert "estimator.name" not in text and "backbone" not in text
    assert (workdir / "impact" / "manifest.json").read_bytes() == before


def test_other_versions_alone_are_a_warning(workdir, caplog):
    with caplog.at_level(logging.WARNING):
        open_manifest(workdir / "impact", manifest(versions={"jax": "0.12.0"}))
    assert "versions.jax is '0.10.0' there, '0.12.0' here" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 3, "'])
def test_a_damaged_manifest(workdir, content):
    (workdir / "impact" / "manifest.json").write_text(content)
    for use in (lambda: read_impact(workdir), lambda: open_manifest(workdir / "impact", manifest())):
        with pytest.raises(InputError) as error:
            use()
        assert "manifest.json is damaged or not of format_version 2" in one_line(error)


NUMBERS = ("num_examples", "num_images", "num_tokens", "views", "num_parts")
ODD = [(name, value) for name in NUMBERS for value in ("3", [3], {}, None, True, 3.0, 0, -1, 10**12)] + [
    *((name, value) for name in ("mask", "target", "backbone") for value in (1, None, ["drop"])),
    *((name, value) for name in ("estimator", "data", "preprocessing", "versions") for value in (1, None, "x", [])),
    ("image_size", 64), ("num_parts", 21), ("num_images", 11),
]  # fmt: skip


@pytest.mark.parametrize("name, value", ODD)
def test_a_manifest_with_odd_entries(workdir, name, value):
    """Under a seal of their own: as another program might write it."""
    path = workdir / "impact" / "manifest.json"
    path.write_bytes(records.text(records.opened(json.loads(path.read_text())) | {name: value}))
    for use in (lambda: read_impact(workdir), lambda: open_manifest(workdir / "impact", manifest())):
        with pytest.raises(InputError) as error:
            use()
        assert f"{name} is {value!r}" in one_line(error) or "manifest.json is damaged" in one_line(error)


def test_a_manifest_of_a_thousand_brackets(workdir):
    (workdir / "impact" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_impact(workdir)


def test_another_format_version(workdir):
    path = workdir / "impact" / "manifest.json"
    path.write_bytes(records.text(records.read(path) | {"format_version": 3}))
    with pytest.raises(InputError, match="format_version 2"):
        read_impact(workdir)


def test_a_changed_digit(workdir):
    path = workdir / "impact" / "manifest.json"
    path.write_text(path.read_text().replace('"num_samples": 16', '"num_samples": 17'))
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_impact(workdir)


def test_parts_without_a_manifest_are_not_adopted(workdir):
    (workdir / "impact" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unknown origin"):
        open_manifest(workdir / "impact", manifest(backbone="c" * 64))


def test_what_is_expected_of_the_manifest(workdir):
    read_impact(workdir, expected={"backbone": "b" * 64, "image_size": (64, 64), "estimator": {"name": "sampled"}})
    with pytest.raises(InputError) as error:
        read_impact(workdir, expected={"backbone": "c" * 64, "views": 4, "target": "label", "data": {"split": "test"}})
    text = one_line(error)
    assert f"backbone is {'b' * 64!r} there, {'c' * 64!r} here" in text
    assert "views is 2 there, 4 here" in text and "data.split is 'train' there, 'test' here" in text
    assert "target" not in text and "data.name" not in text


def test_of_starters_at_once_one_writes_the_manifest(tmp_path):
    """Every starter that gets through finds its own manifest in the end; the others are told."""
    for attempt in range(20):
        directory, outcomes, barrier = tmp_path / str(attempt), {}, threading.Barrier(8)

        def start(k, directory=directory, outcomes=outcomes, barrier=barrier):
            barrier.wait()
            try:
                open_manifest(directory, manifest(backbone=str(k % 2)))
                outcomes[k] = "accepted"
            except InputError:
                outcomes[k] = "refused"

        threads = [threading.Thread(target=start, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = int(json.loads((directory / "manifest.json").read_text())["backbone"])
        assert outcomes == {k: "accepted" if k % 2 == winner else "refused" for k in range(8)}
        assert [path.name for path in directory.iterdir()] == ["manifest.json"]


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", error_numbered(errno.EPERM))
    open_manifest(tmp_path, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    with pytest.raises(InputError, match="mask is"):
        open_manifest(tmp_path, manifest(mask="zero"))
