"""Counted costs beside the published ones, as the table of docs/results.md.

python -m benchmarks.cost
"""

from benchmarks.published import ROWS
from tif_jax import cost


def main() -> None:
    print("| model | reducer | GMAC | published | by | off by | parameters M |\n|---|---|---|---|---|---|---|")
    for row in ROWS:
        counted = cost(row.network())
        options = ", ".join(f"{key} {value}" for key, value in row.options.items())
        print(
            f"| {row.model} | {row.reducer}{', ' * bool(options)}{options} | {counted.gmac:.3f} | {row.gmac:g} | "
            f"{row.source} | {100 * (counted.gmac / row.gmac - 1):+.1f} % | {counted.parameters / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
