"""Plot the loss curves of runs: python scripts/plot_runs.py RUN_FOLDER... [--out curves.png] [--title TEXT]

Thin lines are training losses, lines with markers validation losses. The legend shows the config keys in which the runs
differ. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("agg")
from matplotlib import pyplot as plt

COLORS = ("#4269d0", "#e8862e", "#3a9e6d", "#c4473f", "#8a5cc2", "#7a7a7a")
MACHINE = ("hydra", "resume", "name", "tags", "data.path", "data.workers", "trainer.devices")  # not in the legend


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def labels(runs: list[Path]) -> list[str]:
    """What tells the runs apart: the values of the keys that differ, else the folder's name."""
    configs = [flatten(yaml.safe_load((run / "config.yaml").read_text("utf-8"))) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(MACHINE))
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    texts = (", ".join(f"{key}={config.get(key)}" for key in differing) for config in configs)
    return [text or run.name for text, run in zip(texts, runs, strict=True)]


def points(run: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; null (not finite) is left out."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    found = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
    return [step for step, _ in found], [value for _, value in found]


def plot(runs: list[Path], out: Path, title: str | None) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), dpi=150, layout="constrained")
    for i, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        color = COLORS[i % len(COLORS)]
        axes.plot(*points(run, "train/loss"), color=color, linewidth=0.6, alpha=0.5)
        axes.plot(*points(run, "val/loss"), color=color, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="validation loss (thin: training)", alignment="left")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    figure.savefig(out, facecolor="white", pil_kwargs={"optimize": True})
    print(f"{out}: {out.stat().st_size / 1000:.0f} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--title")
    options = parser.parse_args()
    plot(options.runs, options.out, options.title)


if __name__ == "__main__":
    main()
