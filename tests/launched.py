"""A copy of the launch scripts in a place where gcloud, srun and the like are fakes that note how they were called."""

import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TOOLS = (
    "bash cat chmod cp date dirname env flock git grep gzip head id mkdir mktemp rm sed setsid sleep tail tar tee touch true"
).split()
TIF = ["train", "--stage", "finetune", "--config", "configs/digits.py", "--config.x=(1, 2)", "--workdir", "it's a\tdir"]
VM = ["--name=tpu", "--zone", "us-central1-a", "--type=v5litepod-16", "--pause=0"]

# Runs until it is told to stop or `$FAKE/go_on` appears.
PYTHON = r"""
trap 'echo stopped; exit 75' TERM
echo begun
while [[ ! -e "$FAKE/go_on" ]]; do sleep 0.1; done
exit "$(cat "$FAKE/go_on")"
"""


class Place:
    """A copy of the project's launch folder, with programs of ours before (and few others) on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.calls_file = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        shutil.copytree(LAUNCH, folder / "launch")
        self.environment = {"PATH": str(self.bin), "HOME": str(folder), "FAKE": str(folder)}

    def fake(self, name: str, body: str = "", path: str = "bin") -> None:
        """A program that notes its name and arguments (see `calls`), then does what `body` says."""
        program = self.folder / path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        # In one piece, as several may do so at once.
        note = f"""{{ printf '%s\\0' {name} "$@"; echo; }} >"$FAKE/call.$$"; cat "$FAKE/call.$$" >>"$FAKE/calls"\n"""
        program.write_text(f"#!{shutil.which('bash')}\n{note}{body}\n")
        program.chmod(0o755)

    def calls(self, *beginning: str) -> list[list[str]]:
        """The arguments of each call that begins so, without the beginning."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        every = [line.split("\0")[:-1] for line in text.splitlines()]
        return [call[len(beginning) :] for call in every if call[: len(beginning)] == list(beginning)]

    def start(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str((cwd or self.folder) / "launch" / script), *arguments],
            cwd=self.folder, env=self.environment | environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **options)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for 30 s")
