"""Answers pictures over HTTP: classes, probabilities and tokens kept; many requests share a batch."""

import importlib.util
import logging
from argparse import Namespace
from typing import Any

from tif_jax import checked
from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.commands import _arguments
from tif_jax.commands._reducers import entry_in
from tif_jax.errors import InputError
from tif_jax.models import Model, built_with
from tif_jax.models.cost import cost
from tif_jax.runtime.preemption import stop_flag
from tif_jax.weights.ladder import load_ladder
from tif_jax.weights.loading import load_with_fields

logger = logging.getLogger(__name__)

_NEEDED = ("starlette", "uvicorn", "prometheus_client")
_MIB = 2**20


def main(argv: list[str]) -> None:
    arguments = _parsed(argv)
    _arguments.log_to_stderr()
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f'a server needs {" and ".join(missing)}: pip install "tif_jax[serve]"')
    from tif_jax.serving.app import Limits
    from tif_jax.serving.listening import bound

    limits = Limits(
        requests=_arguments.at_least_1("--max-requests", arguments.max_requests),
        num_bytes=_arguments.at_least_1("--max-megabytes", arguments.max_megabytes) * _MIB,
        patience=_patience(arguments.patience_ms),
    )
    sizes = _arguments.batch_sizes("--batch-sizes", arguments.batch_sizes)
    model = _model(arguments, max(sizes))
    with bound(arguments.host, arguments.port) as listener:
        _serve(model, sizes, limits, listener)


def _parsed(argv: list[str]) -> Namespace:
    parser = _arguments.Parser(prog="tif serve", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="what a run left; or a folder in it, as DIR/backbone")
    source.add_argument("--weights", metavar="FILE", help="a weight file, its folder, hf:OWNER/NAME, or a checkpoint")
    add(
        "--reducer", metavar="REDUCER",
        help="tome:num_merged=8, FILE.json of `tif calibrate`, full (default: what the weights were saved with)",
    )  # fmt: skip
    add(
        "--ladder",
        metavar="FILE.json",
        help="of `tif ladder`: as much for each picture as it needs, with these weights",
    )
    add("--dtype", default="float32", metavar="NAME", help="to compute in (default: float32)")
    add("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all (default: 127.0.0.1, this machine)")
    add("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    add(
        "--batch-sizes",
        default="1,2,4,8,16,32",
        metavar="N,...",
        help="compiled and timed first (default: %(default)s)",
    )
    add(
        "--patience-ms", type=float, default=5.0, metavar="MS",
        help="how long a picture waits for others to share its batch (default: 5)",
    )  # fmt: skip
    add(
        "--max-requests", type=int, default=256, metavar="N",
        help="in work at once; those beyond are answered 503 (default: 256)",
    )  # fmt: skip
    add("--max-megabytes", type=int, default=16, metavar="N", help="of a picture's file; larger: 413 (default: 16)")
    return parser.parse_args(argv)


def _patience(milliseconds: float) -> float:
    if not 0 <= milliseconds <= 60_000:
        raise InputError(f"--patience-ms is {milliseconds:g}; it is from 0 to 60000")
    return milliseconds / 1000


def _model(arguments: Namespace, batch_size: int) -> Model | Adaptive:
    source = arguments.weights if arguments.workdir is None else arguments.workdir
    if arguments.ladder is not None:
        _arguments.check_ladder_alone(arguments)
        return load_ladder(source, arguments.ladder, dtype=arguments.dtype, batch_size=batch_size)
    reducer = dict(entry_in(arguments.reducer).described) if arguments.reducer else {"name": None}
    return load_with_fields(source, reducer=reducer.pop("name"), dtype=arguments.dtype, fresh_told_at=None, **reducer)[
        0
    ]


def _serve(model: Model | Adaptive, sizes: list[int], limits: Any, listener: Any) -> None:
    from tif_jax.serving.app import Service
    from tif_jax.serving.classifier import Classifier
    from tif_jax.serving.listening import serve

    classifier = Classifier(model, sizes)
    logger.info("batches of %s are compiled and timed", ", ".join(map(str, classifier.sizes)))
    seconds = classifier.seconds()
    logger.info("images/s: %s", ", ".join(f"{size / of:.0f} at {size}" for size, of in seconds.items()))
    rungs = [model.models[rung] for rung in model.route.rungs] if isinstance(model, Adaptive) else [model]
    about = {
        "reducers": [checked.to_json(built_with(rung)["reducer"]) for rung in rungs],
        "gmac": [round(cost(rung).gmac, 4) for rung in rungs],
        "num_classes": rungs[-1].num_classes,
        "image_size": list(rungs[-1].image_size),
        "images_per_second": {str(size): round(size / of, 1) for size, of in seconds.items()},
        "max_bytes": limits.num_bytes,
    }
    host, port = listener.getsockname()[:2]
    service = Service(classifier, seconds, limits, about)
    with stop_flag(is_end=True) as stop:
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        serve(service, listener, stop)
