"""The regret of the rows that choose patches (`impact.regret`), as `tif compare` measures and keeps it."""

from collections.abc import Mapping

from tif_jax.commands._compare_work import AT_ONCE, Work
from tif_jax.impact.regret import chooses, impacts, regrets
from tif_jax.models import Model


def measure_regrets(work: Work, models: Mapping[str, Model], num_samples: int) -> None:
    """Of all rows that have one, in an oracle of so many masks an image; those of another oracle are made anew."""
    kept = work.kept
    kept.choose_oracle(num_samples)
    missing = [label for label, model in models.items() if kept.regret(label) is None and chooses(model)]
    if not missing:
        return
    whole, full = work.whole, work.weights.full
    impact = kept.impact
    if impact is None:
        impact = impacts(full, work.read("impact"), work.pictures.batch_size, num_samples)
        kept.impact = impact
        kept.write()
    for first in range(0, len(missing), AT_ONCE):
        group = missing[first : first + AT_ONCE]
        batches = work.read(f"regret of {', '.join(group)}")
        found = regrets(full, [models[label] for label in group], batches, work.mesh, whole, impact)
        kept.add_regrets(dict(zip(group, found, strict=True)))
        kept.write()
