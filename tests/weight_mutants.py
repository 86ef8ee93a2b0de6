"""Damaged weight files, and what reading each comes to, in a process of limited memory.

python weight_mutants.py FOLDER COUNT SEED    prints a JSON line: how many ended how, and the files that ended badly
"""

import collections
import io
import json
import logging
import resource
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from peak import peak
from reference import random_timm_tensors
from torch_bytes import write_state_dict

from tif_jax.errors import InputError
from tif_jax.weights.pretrained import read_weights

ROOM = 2**30  # bytes of address space beyond what the program has when it begins


def base_files(folder):
    """The same small model as a file of each kind."""
    tensors = random_timm_tensors(np.random.default_rng(0), depth=2, width=16, mlp_dim=16, patch_size=2)
    safetensors.numpy.save_file(tensors, folder / "w.safetensors")
    np.savez(folder / "w.npz", **tensors)
    write_state_dict(folder / "w.pth", tensors)
    return {path.suffix: path.read_bytes() for path in folder.glob("w.*")}


# Mutations of bytes: (rng, bytearray) -> bytes


def flip(rng, data):
    for at in rng.integers(0, len(data), rng.integers(1, 5)):
        data[at] ^= 1 << rng.integers(8)
    return data


def flip_in_the_tables(rng, data):
    """In the first bytes or the last: headers, the pickle, the directory of an archive."""
    for _ in range(rng.integers(1, 5)):
        at = rng.integers(0, 600)
        data[at if rng.random() < 0.5 else -1 - at] ^= 1 << rng.integers(8)
    return data


def overwrite_with_extremes(rng, data):
    at = rng.integers(0, len(data) - 8)
    size = int(rng.choice([1, 2, 4, 8]))
    data[at : at + size] = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])] * size)
    return data


def truncate(rng, data):
    return data[: rng.integers(1, len(data))]


def cut_out(rng, data):
    a, b = sorted(rng.integers(0, len(data), 2))
    return data[:a] + data[b:]


def repeat_a_piece(rng, data):
    a, b = sorted(rng.integers(0, len(data), 2))
    return data[:b] + data[a:]


def insert_noise(rng, data):
    at = rng.integers(0, len(data))
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


BYTES = (flip, flip_in_the_tables, overwrite_with_extremes, truncate, cut_out, repeat_a_piece, insert_noise)


# Mutations of what the file says, well formed


def edited_safetensors(rng, data):
    """Another name, shape, type or place of one tensor; or two of them."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in rng.choice(sorted(set(header) - {"__metadata__"}), rng.integers(1, 3), replace=False):
        entry = header[name]
        change = rng.integers(5)
        if change == 0:
            header[_other_name(rng, name, header)] = header.pop(name)
        elif change == 1:
            entry["shape"] = entry["shape"][::-1] if rng.random() < 0.5 else [*entry["shape"], 1]
        elif change == 2:
            entry["shape"] = [int(n) for n in rng.choice([0, 1, 2**31, 2**62, -1], rng.integers(1, 70))]
        elif change == 3:
            entry["dtype"] = str(rng.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E4M3"]))
        else:
            header["again." + name] = dict(entry)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def edited_archive(rng, data):
    """A member renamed, twice, gone, empty, replaced by another or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    buffer = io.BytesIO()
    chosen, change = rng.integers(len(members)), rng.integers(6)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of two members with one name
        for i, (name, content) in enumerate(members):
            if i == chosen and change == 0:
                name = _other_name(rng, name, dict(members))
            elif i == chosen and change == 1:
                archive.writestr(name, content)
            elif i == chosen and change == 2:
                continue
            elif i == chosen and change == 3:
                content = b""
            elif i == chosen and change == 4:
                content = members[rng.integers(len(members))][1]
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if change == 5 else zipfile.ZIP_STORED)
    return buffer.getvalue()


def _other_name(rng, name, names):
    return str(rng.choice(["x", "../" + name, name[1:], name + ".npy", name.upper(), "é" + name, *sorted(names)]))


def mutant(rng, suffix, data):
    """A name of the mutation, and the bytes."""
    edit = edited_safetensors if suffix == ".safetensors" else edited_archive
    change = edit if rng.random() < 0.25 else BYTES[rng.integers(len(BYTES))]
    return change.__name__, bytes(change(rng, bytearray(data)))


GOOD = ("refused", "same fields", "told")


class Told(logging.Handler):
    """How many warnings there were."""

    number = 0

    def emit(self, record):
        self.number += 1


def outcome(path, expected, told):
    """'refused', 'same fields', 'told' (another model, with a warning that says so), or what is wrong."""
    before = told.number
    try:
        fields, _ = read_weights(path, num_heads=2)
    except InputError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"no line: {error}"
    except BaseException:
        return traceback.format_exc()
    return "same fields" if fields == expected else "told" if told.number > before else f"another model: {fields}"


def main(folder, count, seed):
    told = Told(logging.WARNING)
    logging.getLogger("tif_jax").addHandler(told)
    folder, rng = Path(folder), np.random.default_rng(int(seed))
    files = base_files(folder)
    expected = [read_weights(folder / f"w{suffix}", num_heads=2)[0] for suffix in files]
    assert expected[0] == expected[1] == expected[2]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
    outcomes, bad = collections.Counter(), {}
    for i in range(int(count)):
        suffix = sorted(files)[i % len(files)]
        kind, data = mutant(rng, suffix, files[suffix])
        path = folder / f"mutant{suffix}"
        path.write_bytes(data)
        found = outcome(path, expected[0], told)
        outcomes[found if found in GOOD else "bad"] += 1
        if found not in GOOD:
            (folder / f"bad_{i}{suffix}").write_bytes(data)
            bad[f"{i} {kind}{suffix}"] = found[-2000:]
    print(json.dumps({"outcomes": outcomes, "bad": bad, "peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
