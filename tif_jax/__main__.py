"""`tif COMMAND --config NAME|FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR`; the same as `python -m tif_jax COMMAND ...`.

Exit status: 0 done; 1 the work failed; 2 what the user gave is wrong; 75 stopped by SIGTERM, 130 by Ctrl-C: run it again.

Signals are heeded before JAX is imported, which takes a while: what is imported here at once must not import it.
"""

import difflib
import errno
import importlib
import importlib.metadata
import multiprocessing
import os
import pkgutil
import platform
import select
import shlex
import sys
import threading
import traceback
from contextlib import suppress
from typing import NoReturn

from tif_jax import commands
from tif_jax.errors import InputError, Preempted, WorkError, is_shortage
from tif_jax.runtime import log_file, preemption
from tif_jax.runtime.machine import num_cores
from tif_jax.runtime.version import __version__

_HELP = ("--help", "-h", "help")
_WITHOUT_JAX = ("status",)
_BAD_WORKDIR = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def program() -> NoReturn:
    """The program `tif`: `main` in a process of its own, which ends even if threads of a failed write never do."""
    # Of what worker processes shared with one that ended at once; it is cleared away all the same.
    sys.warnoptions.append("ignore:resource_tracker")
    with preemption.handled(_end) as signals:
        try:
            status = main()
        except SystemExit as done:  # of argparse, after --help
            status = done.code if isinstance(done.code, int) else bool(done.code)
        except BaseException:
            if watch := sys.modules.get("tif_jax.runtime.watch"):
                watch.crash()
            traceback.print_exc()
            status = 1
        signals.over.set()
        if status:
            _end(status)
    sys.exit(0)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status. Expected failures print one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    log_file.end(None)  # what was said before, to a caller of the library, is no part of this command
    log_file.command = shlex.join(["tif", *argv])
    name = f"tif {argv[0]}" if argv and argv[0] in _command_names() else "tif"
    with preemption.handled() as signals:
        signals.name, status = name, 1
        try:
            status = _outcome(name, argv)
            sys.stdout.flush()
        except Preempted as error:
            status = _fail(name, error, signals.status())
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
            status = 0  # `| head`; all is done but for what nobody reads
        except BaseException:
            log_file.note(traceback.format_exc())
            raise
        finally:
            log_file.end(status)
        return status


def _outcome(name: str, argv: list[str]) -> int:
    """The exit status of a command, where it is not stopped."""
    try:
        return _run(argv)
    except InputError as error:
        return _fail(name, error, 2)
    except WorkError as error:
        return _fail(name, error, 1)
    except OSError as error:
        if error.errno in _BAD_WORKDIR:
            return _fail(name, f"{error.strerror}: {error.filename}; choose a folder that can be written", 2)
        if error.errno in _DISK_FULL:
            full = error.filename or "a file was cut short"
            return _fail(name, f"{error.strerror}: {full}; make room and run the same command again", 1)
        if error.errno == errno.ENAMETOOLONG:
            return _fail(name, f"{error.strerror}: {str(error.filename)[:100]}...", 2)
        raise
    except (MemoryError, RuntimeError) as error:  # JAX's are RuntimeErrors
        if not is_shortage(error):
            raise
        remedy = "what is finished is intact: take smaller batches, or a machine with more memory"
        return _fail(name, f"{str(error)[:200] or 'out of memory'}; {remedy}", 1)


def _run(argv: list[str]) -> int:
    names = _command_names()
    if not argv or argv[0] in _HELP:
        if len(argv) < 2:
            from tif_jax.commands import _usage

            print(_usage.usage(names), file=sys.stdout if argv else sys.stderr)
            return 0 if argv else 2
        if argv[1] in names:
            return _run([argv[1], "--help"])
        from tif_jax.commands import _help

        print(_help.help_on(argv[1], argv[2:], names))
        return 0
    if argv[0] == "--version":
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        besides = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"tif_jax {__version__} ({besides}, Python {platform.python_version()})")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise InputError(f"no command {name!r}; did you mean {nearest[0]!r}? `tif --help` lists all")
    if name not in _WITHOUT_JAX:
        use_all_cores()
        # Compiled programs are kept between runs and seeds.
        _unless_given("jax_compilation_cache_dir", os.path.expanduser("~/.cache/tif_jax"))
    importlib.import_module(f"tif_jax.commands.{name}").main(rest)
    return 0


def _command_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]


def _end(status: int) -> None:
    """Ends this process at once: threads of a failed write print long after it, or never end."""
    log_file.end(status)
    if watch := sys.modules.get("tif_jax.runtime.watch"):
        watch.leave(status)  # returns where this process is alone
    for child in multiprocessing.active_children():
        child.kill()
    if threading.current_thread() is threading.main_thread():  # or it may be at it, and stuck
        with suppress(OSError, ValueError):
            sys.stdout.flush()
    os._exit(status)


def _reader_is_gone() -> bool:
    """Whether nobody reads what this process prints: not every broken pipe is that of stdout."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def use_all_cores() -> None:
    """Splits a CPU into as many JAX devices as it has cores, rounded down to a power of two, before JAX starts.

    XLA leaves about a third of the cores idle inside one CPU program; a batch spread over devices does not. (Three devices
    on four cores were seen to wait for each other for ever in an all-reduce.) Accelerators are not touched.
    JAX_NUM_CPU_DEVICES or --xla_force_host_platform_device_count in XLA_FLAGS overrides it.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_collective_call_terminate_timeout_seconds" not in xla_flags:
        # On a busy machine one core's share of a step can come late by more than XLA's 40 s, which then aborts.
        os.environ["XLA_FLAGS"] = f"{xla_flags} --xla_cpu_collective_call_terminate_timeout_seconds=1200".strip()
    if "xla_force_host_platform_device_count" not in xla_flags:
        _unless_given("jax_num_cpu_devices", 2 ** (num_cores().bit_length() - 1))
    # Two programs in flight at once on the same CPU devices can wait for each other's all-reduce for ever.
    _unless_given("jax_cpu_enable_async_dispatch", False)


def _unless_given(option: str, value: object) -> None:
    """Sets a JAX option that the environment does not."""
    import jax

    if option.upper() not in os.environ:
        jax.config.update(option, value)


def _fail(name: str, error: object, status: int) -> int:
    line = f"{name}: {' '.join(str(error).split())}"
    log_file.note(line)
    print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    program()
