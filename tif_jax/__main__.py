"""`tif COMMAND --config FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR`; the same as `python -m tif_jax COMMAND ...`.

Exit status: 0 done; 1 the work failed; 2 what the user gave is wrong; 75 stopped by SIGTERM after saving: run it again.
"""

import difflib
import errno
import importlib
import os
import pkgutil
import signal
import sys

import jax

from tif_jax import checked, commands, reducers
from tif_jax.errors import InputError, Preempted, WorkError
from tif_jax.experiment.schema import Experiment
from tif_jax.runtime import watch

_HELP = ("--help", "-h", "help")
_BAD_WORKDIR = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    names = [module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")]
    if argv and argv[0] in _HELP:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        return _help(argv[1:], names)
    if not argv:
        print(_usage(names), file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        print(f"tif: no command {name!r}; did you mean {nearest[0]!r}? `tif --help` lists all", file=sys.stderr)
        return 2
    use_all_cores()
    # Compiled programs are kept between runs and seeds.
    _unless_given("jax_compilation_cache_dir", os.path.expanduser("~/.cache/tif_jax"))
    try:
        status = _run(name, rest)
    except BaseException:
        watch.crash()
        raise
    if status:
        watch.leave(status)
    return status


def _help(topics: list[str], names: list[str]) -> int:
    """`tif --help`, or of a topic or command what there is to say."""
    if not topics:
        print(_usage(names))
    elif topics[0] in _TOPICS:
        print(_TOPICS[topics[0]]())
    elif topics[0] in names:
        return main([topics[0], "--help"])
    else:
        nearest = difflib.get_close_matches(topics[0], [*_TOPICS, *names], n=1, cutoff=0.0)
        print(f"tif: no help on {topics[0]!r}; did you mean `tif --help {nearest[0]}`?", file=sys.stderr)
        return 2
    return 0


def _run(name: str, rest: list[str]) -> int:
    """Runs the command. Expected failures print one line on stderr."""
    try:
        importlib.import_module(f"tif_jax.commands.{name}").main(rest)
    except InputError as error:
        return _fail(name, error, 2)
    except WorkError as error:
        return _fail(name, error, 1)
    except Preempted as error:
        return _fail(name, error, 75)
    except OSError as error:
        if error.errno in _BAD_WORKDIR:
            return _fail(name, f"{error.strerror}: {error.filename}; choose a folder that can be written", 2)
        if error.errno in _DISK_FULL:
            full = error.filename or "a file was cut short"
            return _fail(name, f"{error.strerror}: {full}; make room and run the same command again", 1)
        raise
    return 0


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
        _unless_given("jax_num_cpu_devices", 2 ** (_num_cores().bit_length() - 1))
    # Two programs in flight at once on the same CPU devices can wait for each other's all-reduce for ever.
    _unless_given("jax_cpu_enable_async_dispatch", False)


def _unless_given(option: str, value: object) -> None:
    """Sets a JAX option that the environment does not."""
    if option.upper() not in os.environ:
        jax.config.update(option, value)


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fail(name: str, error: object, status: int) -> int:
    print(f"tif {name}: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _usage(names: list[str]) -> str:
    lines = [f"  {name:<10} {_summary(name)}" for name in names]
    usage = "usage: tif COMMAND --config FILE[:ARG] [--config.KEY=VALUE ...] --workdir DIR"
    topics = "`tif --help config` lists the keys of a config, `tif --help reducers` the reducers and their options"
    return "\n".join([usage, "", *lines, "", topics])


def _describe_reducers() -> str:
    """Each reducer: what its file says of it in one line, and its options with their defaults."""
    described = []
    for name in reducers.known():
        module = importlib.import_module(f"tif_jax.reducers.{name}")
        options = [f"  {key} = {option.default!r}" for key, option in reducers.options(name).items()]
        described.append("\n".join([f"{name}: {(module.__doc__ or '').splitlines()[0]}", *options]))
    return "\n\n".join(described)


def _describe_config() -> str:
    """Each key of a config with its default, what it may be and what it is for."""
    lines = []
    for key in checked.keys(Experiment):
        default = getattr(key.default, "described", key.default)
        lines += [f"{key.path} = {default!r}", f"    {key.help} ({key.allowed})"]
    return "\n".join(lines)


_TOPICS = {"config": _describe_config, "reducers": _describe_reducers}


def _summary(name: str) -> str:
    return (importlib.import_module(f"tif_jax.commands.{name}").__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
