"""A program for test_odd_overrides.py: odd values for every key of a config, one call of `tif` each, in bounded memory.

`python odd_overrides.py FOLDER [some]` makes the project of `small_project` in FOLDER and prints a line of JSON for each call
(arguments, status, seconds, what came on stderr) and at last the memory that all took.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

from peak import peak
from small_project import forget_handlers, prepare, tif

from tif_jax import __main__ as program
from tif_jax import checked
from tif_jax.commands import score
from tif_jax.experiment.schema import Experiment

ROOM = 2 * 2**30  # bytes of addresses beyond what the program has once it has run
HUGE = ["9" * 20, "1" + "0" * 400, "-" + "9" * 30, "1e308", "-1e308", "1e400"]
ODD = [
    *HUGE, "nan", "inf", "-inf", "-1", "0", "", " ", "'", '"', "'\"'", "None", "True", "[]", "{}", "()", "((((" * 20,
    "[" * 3000 + "]" * 3000, "-" * 5000 + "1", "[1,", "(1,)", "((1, 2), (3,))", "{'a': {'a': {'a': 1}}}", "1, 2,, 3",
    "x" * 100_000, "9" * 5000, "0.1.2", "\u2603", "\udce9", "\u0663", "b'x'", "1j", "...", "1 << 70", "lambda: 0", "2/1",
    "1/" + "9" * 5000, "__import__('pathlib').Path('evil').touch()",
    "{'name': 'tif', 'then': {'name': 'tif', 'then': {'name': 'tif'}}}",
]  # fmt: skip
KEYS = [
    *(key.path for key in checked.keys(Experiment)),
    "reducer.name", "reducer.keep_ratio", "reducer.budget", "reducer.then", "reducer.then.name", "reducer.reducer",
    "backbone.model.width", "backbone.model.depth", "backbone.model.image_size", "finetune.model.depth",
]  # fmt: skip
ODD_KEYS = [
    "", ".", " ", "seed.", ".seed", "[seed]", "seed[0]", "None", "__class__", "data.__init__", "data" + ".x" * 500,
    "x" * 10_000, "data.class_index.dog", "when_quick.seed",
]  # fmt: skip
# Values that ask for more memory, steps, or threads than there are, or for what there is not.
SCORED = [
    "data.image_size=16384", "score.batch_size=1048576", "score.chunk=1048576", "score.num_images=2147483647",
    "score.part=1/999999999", "data.root=" + "x" * 5000, "data.train_split=" + "../" * 2000, "data.train_split=\u2603.csv",
    "data.std=1e-38,1e-38,1e-38",
]  # fmt: skip
TRAINED = [
    "backbone.model.depth=1000000", "backbone.model.width=65536", "backbone.model.image_size=16384", "backbone.freeze=((((",
    "backbone.freeze=a{99999999999}", "backbone.freeze=" + "x" * 100_000, "backbone.learning_rate=1000000",
    "sharding.fsdp=1048576", "backbone.init_from=" + "x" * 5000, "backbone.init_from=\udce9.npz",
]  # fmt: skip


def calls(one_each):
    """(command, override), (command, override), ...: of each key one or two of the odd values, in turns."""
    for number, key in enumerate(KEYS):
        if not one_each or number % 5 == 0:
            yield "loaded", f"{key}={HUGE[number % len(HUGE)]}"
        if not one_each or number % 5:
            yield "loaded", f"{key}={ODD[number % len(ODD)]}"
    for key in ODD_KEYS:
        yield "loaded", f"{key}=1"
    yield from (("score", override) for override in SCORED)
    yield from (("train --stage=backbone", override) for override in TRAINED)


def main(folder, some=""):
    os.chdir(prepare(Path(folder)))
    for command in ("train --stage=backbone", "score"):  # what is loaded once is loaded
        assert tif(f"{command} --config.backbone.num_epochs=1") == 0
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))
    work = score.score_training
    for number, (command, override) in enumerate(calls(some == "some")):
        score.score_training = (lambda *_: None) if command == "loaded" else work
        errors, began = io.StringIO(), time.perf_counter()
        if command == "score":  # the same folder for all: what was scored with other settings is refused
            shutil.rmtree("run/impact", ignore_errors=True)
        workdir = f"odd{number}" if command.startswith("train") else "run"
        words = ["--config=config.py", f"--workdir={workdir}", "--config.score.num_images=2", f"--config.{override}"]
        forget_handlers()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = program.main([*("score" if command == "loaded" else command).split(), *words])
        outcome = {"call": [command, override], "status": status, "stderr": errors.getvalue()}
        print(json.dumps(outcome | {"seconds": time.perf_counter() - began}), flush=True)
    print(json.dumps({"peak": peak()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
