"""Eight CPU devices, implicit rank promotion is an error, programs compile fast and are kept between runs."""

import gc
import importlib.metadata
import logging
import os
import shutil
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
# Tiny programs run once each: to optimise them takes longer than it saves.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        # Later ones abort at a flag that they no longer know.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.12" else "",
    ]
)
# Of programs that the tests start, too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Tracing makes and drops millions of objects; to look for cycles among them this often is a quarter less work.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files of tests are given to workers one after the other: the longest first, so that none is left over in the end.
LONGEST = ("test_pipeline", "test_survival", "test_score_job", "test_processes", "test_tosa", "test_training")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture
def strict_dtypes():
    """Mixing dtypes without saying so is an error."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real weights and photographs: $TIF_DATA, or ../shared/data beside the project; the test is skipped without them."""
    root = Path(os.environ.get("TIF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data: {root} does not exist (set TIF_DATA)")
    return root


@pytest.fixture(autouse=True)
def _log_propagates():
    """`main` gives our logger a handler of its own and cuts it off from the root, where caplog listens."""
    logging.getLogger("tif_jax").propagate = True


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A small project with a trained backbone and its impacts."""
    from small_project import finish

    return finish(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of `finished` as the current folder: free to damage."""
    from small_project import forget_handlers

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget_handlers()
