"""As much as each picture needs: which cheap models to try first, and how sure each has to be, without labels."""

import logging
import os
import time
from pathlib import Path

from tif_jax.adaptive.adaptive import Adaptive
from tif_jax.adaptive.routing import ALWAYS
from tif_jax.commands import _arguments
from tif_jax.commands._compare_rows import rows_asked
from tif_jax.commands._found import check_replaceable, found_from, found_on_the_same
from tif_jax.commands._pictures import opened, read_all
from tif_jax.commands._weights import read_weights
from tif_jax.errors import InputError
from tif_jax.models import built_with
from tif_jax.runtime import files, records
from tif_jax.weights.ladder import described

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    parser = _arguments.Parser(prog="tif ladder", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    _arguments.add_weights_and_images(parser)
    add(
        "--reducer", required=True, action="append", metavar="REDUCER",
        help="of a cheap model: tome:num_merged=8, FILE.json or a folder of `tif calibrate`; may be repeated",
    )  # fmt: skip
    add(
        "--agreement", required=True, type=float, metavar="SHARE",
        help="of other pictures that are to have the class which all tokens give them: 0.95",
    )  # fmt: skip
    add("--out", required=True, metavar="FILE.json", help="the ladder: for tif serve --ladder and tif_jax.load_ladder")
    add("--num-images", type=int, default=512, metavar="N", help="at most, evenly spaced; all are held in memory (512)")
    arguments = parser.parse_args(argv)
    _arguments.log_to_stderr()
    if not 0 < arguments.agreement <= 1:
        raise InputError(f"--agreement is {arguments.agreement:g}; it is a share, above 0 and at most 1")
    _arguments.at_least_1("--num-images", arguments.num_images)
    path = _path(arguments.out)
    weights = read_weights(arguments.weights, "float32", "a ladder")
    entries = [row.entry for row in rows_asked(weights, arguments.reducer, [], 32) if row.entry.name != "full"]
    pictures = opened(arguments.images, None, weights.full, None, arguments.num_images)
    if same := found_on_the_same(arguments.reducer, pictures.fingerprint):
        logger.warning(
            "%s: found from these very pictures, and will look better on them than on others; give others to --images",
            ", ".join(same),
        )
    began = time.monotonic()
    ladder = [weights.model(entry.described) for entry in entries]
    images = read_all(pictures)
    adaptive = Adaptive(weights.full, ladder, arguments.agreement, images)
    reducers = [built_with(model)["reducer"] for model in adaptive.models[:-1]]
    expected = adaptive.expected
    assert expected is not None and adaptive.error is not None
    made = found_from(weights, pictures, len(images), time.monotonic() - began) | {"agreement": arguments.agreement}
    made |= {"expected": {"agreement": expected.agreement, "error": adaptive.error, "gmac": expected.cost}}
    files.write(path, records.text({**described(adaptive, reducers), "calibration": made}))
    print("\n".join([*_summary(adaptive), str(path)]))


def _path(out: str) -> Path:
    path = Path(os.path.expanduser(out))
    if not out.endswith(".json"):
        raise InputError(f"--out is {out!r}; it is a file on this machine whose name ends in .json")
    files.check_writable(path.parent)
    check_replaceable(path)
    return path


def _summary(adaptive: Adaptive) -> list[str]:
    lines = []
    for rung, threshold in zip(adaptive.route.rungs, adaptive.route.thresholds, strict=True):
        name, gmac = built_with(adaptive.models[rung])["reducer"]["name"], adaptive.costs[rung]
        stays = "the last" if threshold == ALWAYS else f"has the answer if its log-odds are {threshold:.2f} or more"
        lines.append(f"{name}, {gmac:.4f} GMAC: {stays}")
    expected, error = adaptive.expected, adaptive.error
    assert expected is not None and error is not None
    share = f"{100 * expected.agreement:.1f} ± {100 * error:.1f} %"
    lines.append(f"to expect of other pictures: agreement {share}, {expected.cost:.4f} GMAC each")
    return lines
