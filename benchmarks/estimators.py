"""What each estimator of impact costs and what its ranking is worth: a real DeiT-Ti on real photographs.

    python -m benchmarks.estimators [NUM_IMAGES]

Needs imagenet_ccby and the DeiT-Ti weights in $TIF_DATA (default: ../shared/data). Prints images/s (compilation excluded),
the cost of an image in plain forward passes of the same run, the mean per-image Spearman correlation with exact-drop, and
cross-entropy in nats / top-1 of the model, as it is, when only a ranking's best 137, 98 or 49 of the 196 tokens are kept.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks._common import data_root, plain_forward
from tif_jax import load
from tif_jax.__main__ import use_all_cores
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.impact import judge
from tif_jax.impact.rankings import class_attention_ranking, mean_spearman
from tif_jax.impact.scoring import Scorer
from tif_jax.models import plain_vit
from tif_jax.runtime.mesh import make_mesh

BATCH_SIZE = 16
ESTIMATORS = {
    "exact, drop": dict(estimator="exact"),
    "exact, drop, bfloat16": dict(estimator="exact", dtype="bfloat16"),
    "exact, zero": dict(estimator="exact", mask="zero"),
    "gradient": dict(estimator="gradient"),
    "gradient, bfloat16": dict(estimator="gradient", dtype="bfloat16"),
    **{f"sampled, keep 0.5, K={k}": dict(estimator="sampled", num_samples=k) for k in (2, 4, 8, 16)},
    "sampled, keep 0.7, K=16": dict(estimator="sampled", num_samples=16, keep_ratio=0.7),
}
DEFAULTS = dict(mask="drop", target="label", num_samples=1, keep_ratio=0.5, dtype="float32")
NUM_KEPT = (137, 98, 49)
WEIGHTS = "deit_tiny_patch16_224.safetensors"


def table(root: Path, num_images: int) -> dict[str, dict]:
    """Row name -> images_per_second, spearman, and cross_entropy and top1 by number of tokens kept."""
    model = plain_vit(load(root / WEIGHTS), "a ranking of patches")
    data = dict(name="image_table", root=str(root / "imagenet_ccby"), test_split="labels.csv", num_test=num_images)
    batches = list(evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE))
    mesh = make_mesh(BATCH_SIZE)
    rows = {name: _measured(root, batches, **DEFAULTS | options) for name, options in ESTIMATORS.items()}
    rows["exact, zero, absolute value"] = {"impact": np.abs(rows["exact, zero"]["impact"])}
    attention, _ = judge.over_batches(
        lambda models, x, _: class_attention_ranking(models[0], x), [model], batches, mesh
    )
    rows["class attention"] = {"impact": attention}
    rows["random"] = {"impact": np.random.default_rng(0).random(attention.shape)}

    found = {name: row.pop("impact").astype(np.float32) for name, row in rows.items()}
    unreduced, outcomes = judge.judge_rankings(model, batches, mesh, found, [n / 196 for n in NUM_KEPT])
    for name, row in rows.items():
        row["spearman"] = mean_spearman(found[name], found["exact, drop"])
        row |= dict(zip(NUM_KEPT, outcomes[name].values(), strict=True))
    rows["all 196 tokens"] = {"images_per_second": _plain_speed(model, batches), 196: unreduced}
    return rows


def _measured(root, batches, dtype, **options) -> dict:
    scorer = Scorer(load(root / WEIGHTS, dtype=dtype), BATCH_SIZE, **options)
    scorer(batches[0]["image"], batches[0]["label"])()
    start = time.perf_counter()
    impact = [scorer(batch["image"], batch["label"])().impact[batch["weight"] > 0] for batch in batches]
    speed = len(batches) * BATCH_SIZE / (time.perf_counter() - start)
    return {"impact": np.concatenate(impact), "images_per_second": speed}


def _plain_speed(model, batches) -> float:
    """Images/s of the plain forward pass, the best of three batch sizes."""
    images = np.concatenate([batch["image"] for batch in batches])
    speeds = []
    for size in (16, 32, 64):
        forward = plain_forward(model, np.resize(images, (size, *images.shape[1:])))
        forward()
        start = time.perf_counter()
        for _ in range(256 // size):
            forward()
        speeds.append(256 / (time.perf_counter() - start))
    return max(speeds)


def main() -> None:
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    root = data_root()
    use_all_cores()
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {num_images} images, float32 where not said\n")
    print("| ranking | images/s | forwards | rho(drop) | " + " | ".join(f"keep {n}" for n in NUM_KEPT) + " |")
    print("|---" * (4 + len(NUM_KEPT)) + "|")
    rows = table(root, num_images)
    plain = rows["all 196 tokens"]["images_per_second"]
    for name, row in rows.items():
        cost = ["", ""]
        if speed := row.get("images_per_second"):
            cost = [f"{speed:.2f}", f"{plain / speed:.1f}"]
        kept = [f"{row[n]['cross_entropy']:.3f} / {row[n]['top1']:.3f}" for n in (*NUM_KEPT, 196) if n in row]
        print("| " + " | ".join([name, *cost, f"{row['spearman']:.2f}" if "spearman" in row else "", *kept]) + " |")


if __name__ == "__main__":
    main()
