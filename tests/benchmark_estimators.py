"""What each estimator of impact costs and what its ranking is worth: a real DeiT-Ti on real photographs.

    python tests/benchmark_estimators.py [NUM_IMAGES]

Needs imagenet_ccby and the DeiT-Ti weights in $TIF_DATA (default: ../shared/data). Prints images/s (compilation excluded),
the mean per-image Spearman correlation with exact-drop, and cross-entropy in nats / top-1 of the model, as it is, when only
a ranking's best 137, 98 or 49 of the 196 tokens are kept.
"""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np

from tif_jax import load, oracle, rankings
from tif_jax.__main__ import use_all_cores
from tif_jax.data import open_source
from tif_jax.data.loader import evaluation_batches
from tif_jax.state import make_mesh, shard

BATCH_SIZE = 16
ESTIMATORS = {
    "exact, drop": dict(estimator="exact", mask="drop"),
    "exact, zero": dict(estimator="exact", mask="zero"),
    "gradient": dict(estimator="gradient"),
    "sampled, keep 0.5, K=4": dict(estimator="sampled", num_samples=4, keep_ratio=0.5),
    "sampled, keep 0.5, K=16": dict(estimator="sampled", num_samples=16, keep_ratio=0.5),
    "sampled, keep 0.7, K=16": dict(estimator="sampled", num_samples=16, keep_ratio=0.7),
}
DEFAULTS = dict(mask=None, target="label", num_samples=1, keep_ratio=0.5)
NUM_KEPT = (137, 98, 49)


def table(root: Path, num_images: int) -> dict[str, dict]:
    """Row name -> images_per_second, spearman, and cross_entropy and top1 by number of tokens kept."""
    model = load(root / "deit_tiny_patch16_224.safetensors")
    data = dict(name="image_table", root=str(root / "imagenet_ccby"), test_split="labels.csv", num_test=num_images)
    batches = list(evaluation_batches(open_source(data, "test"), data, batch_size=BATCH_SIZE))
    images, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("image", "label"))
    real = np.concatenate([batch["weight"] for batch in batches]) > 0
    rows = {name: _measured(model, batches, options) for name, options in ESTIMATORS.items()}
    rows["exact, zero, absolute value"] = {"impact": np.abs(rows["exact, zero"]["impact"])}
    attention = jax.jit(lambda x: rankings.class_attention_ranking(model, x))
    rows["class attention"] = {"impact": np.concatenate([attention(batch["image"]) for batch in batches])}
    rows["random"] = {"impact": np.random.default_rng(0).random(rows["gradient"]["impact"].shape)}
    rows["all 196 tokens"] = {"impact": rows["random"]["impact"]}

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


def _measured(model, batches, options) -> dict:
    mesh = make_mesh(BATCH_SIZE)
    scorer = oracle.scorer(model, mesh, **{**DEFAULTS, **options})
    arrays = [shard({key: batch[key] for key in ("image", "label")}, mesh) for batch in batches]
    jax.block_until_ready(scorer(arrays[0]["image"], arrays[0]["label"]))
    start = time.perf_counter()
    impact = [np.asarray(scorer(batch["image"], batch["label"]).impact) for batch in arrays]
    return {
        "impact": np.concatenate(impact),
        "images_per_second": len(arrays) * BATCH_SIZE / (time.perf_counter() - start),
    }


def main() -> None:
    num_images = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    root = Path(os.environ.get("TIF_DATA") or Path(__file__).parents[2] / "shared" / "data")
    use_all_cores()
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {num_images} images, float32\n")
    print("| ranking | images/s | rho(drop) | " + " | ".join(f"keep {n}" for n in NUM_KEPT) + " |")
    print("|---" * (3 + len(NUM_KEPT)) + "|")
    for name, row in table(root, num_images).items():
        speed = f"{row['images_per_second']:.2f}" if "images_per_second" in row else ""
        kept = [f"{row[n]['cross_entropy']:.3f} / {row[n]['top1']:.3f}" for n in (*NUM_KEPT, 196) if n in row]
        print(f"| {name} | {speed} | {row['spearman']:.2f} | {' | '.join(kept)} |")


if __name__ == "__main__":
    main()
