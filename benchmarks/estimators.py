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
from tif_jax.impact import rankings
from tif_jax.impact.scoring import Scorer

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
    model = load(root / WEIGHTS)
    data = dict(name="image_table", root=str(root / "imagenet_ccby"), test_split="labels.csv", num_test=num_images)
    batches = list(evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE))
    images, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("image", "label"))
    real = np.concatenate([batch["weight"] for batch in batches]) > 0
    rows = {name: _measured(root, batches, **DEFAULTS | options) for name, options in ESTIMATORS.items()}
    rows["exact, zero, absolute value"] = {"impact": np.abs(rows["exact, zero"]["impact"])}
    attention = jax.jit(lambda x: rankings.class_attention_ranking(model, x))
    rows["class attention"] = {"impact": np.concatenate([attention(batch["image"]) for batch in batches])}
    rows["random"] = {"impact": np.random.default_rng(0).random(rows["gradient"]["impact"].shape)}
    rows["all 196 tokens"] = {"impact": rows["random"]["impact"], "images_per_second": _plain_speed(model, batches)}

    def kept_logits(ranking, num_kept):
        follow = jax.jit(lambda x, r: rankings.logits_of_best(model, x, r, num_kept / 196))
        parts = range(0, len(images), BATCH_SIZE)
        return np.concatenate([follow(images[i : i + BATCH_SIZE], ranking[i : i + BATCH_SIZE]) for i in parts])[real]

    exact_drop = rows["exact, drop"]["impact"][real]
    for name, row in rows.items():
        ranking = row.pop("impact").astype(np.float32)
        row["spearman"] = rankings.mean_spearman(ranking[real], exact_drop)
        for num_kept in (196,) if name == "all 196 tokens" else NUM_KEPT:
            logits = kept_logits(ranking, num_kept)
            loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), labels[real]]
            row[num_kept] = {"cross_entropy": loss.mean(), "top1": (logits.argmax(axis=1) == labels[real]).mean()}
    return rows


def _measured(root, batches, dtype, **options) -> dict:
    scorer = Scorer(load(root / WEIGHTS, dtype=dtype), BATCH_SIZE, **options)
    scorer(batches[0]["image"], batches[0]["label"])()
    start = time.perf_counter()
    impact = [scorer(batch["image"], batch["label"])().impact for batch in batches]
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
        print("| " + " | ".join([name, *cost, f"{row['spearman']:.2f}", *kept]) + " |")


if __name__ == "__main__":
    main()
