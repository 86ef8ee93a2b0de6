"""Programs for tests as processes that start at once: what they import takes longer than what they do.

    python forks.py MODULE    for each line of its input starts MODULE.run(...) in a fork of its own, or says how one ended

MODULE.prepare() comes before the first; it must not start JAX.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Server:
    """Starts runs of a module of this folder. environment: for all of them, beside what there is now."""

    def __init__(self, module, **environment):
        self.process = subprocess.Popen(
            [sys.executable, __file__, module],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.forks = []

    def start(self, *arguments, log):
        """A run in the current folder; what it prints is appended to the file `log`."""
        task = dict(arguments=[str(a) for a in arguments], folder=os.getcwd(), log=str(log))
        self.forks.append(Fork(self, self.ask(start=task), Path(log).absolute()))
        return self.forks[-1]

    def ask(self, **what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        for fork in self.forks:  # those that a failed test has left
            if fork.poll() is None:
                fork.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Fork:
    """What a test asks of a process: as of subprocess.Popen."""

    def __init__(self, server, number, log):
        self.server, self.number, self.log, self.returncode = server, number, log, None

    def poll(self):
        if self.returncode is None:
            self.returncode = self.server.ask(poll=self.number)
        return self.returncode

    def wait(self, timeout=120):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(self.log.read_text())
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.number, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def serve(module):
    module.prepare()
    for line in sys.stdin:
        (what, of), *_ = json.loads(line).items()
        if what == "poll":
            number, status = os.waitpid(of, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if number else None), flush=True)
        elif number := os.fork():
            print(number, flush=True)
        else:
            os.chdir(of["folder"])
            with open(of["log"], "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.exit(module.run(*of["arguments"]))


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]))
