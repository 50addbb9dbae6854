"""results.png: a row per table, with the loss curves and the metric over each key that varies."""

import io
import statistics
import warnings
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from gptlab.results import Configuration, Table, assignments, differences, is_number, label, shown

COLORS = ("#4269d0", "#e8862e", "#3a9e6d", "#c4473f", "#8a5cc2", "#97bbf5", "#9c6b4e", "#d45fa6")  # of the best
GRAY = "#b0b0b0"


def draw(tables: list[Table]) -> bytes:
    tables = tables[:6]
    rows, columns = max(1, len(tables)), 1 + max((len(table.keys[:5]) for table in tables), default=0)
    figure, file = Figure((1.5 + 4 * columns, 3.6 * rows), dpi=110, layout="constrained"), io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        warnings.simplefilter("ignore")  # the font lacks a character
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for row, table in zip(panels, tables, strict=False):
            title = "; ".join(table.agreement[key] for key in differences(tables) or ["stopping rule"])
            colors = dict(zip(table.ranked, COLORS, strict=False))
            draw_curves(row[0], table, colors, title)
            for axes, key in zip(row[1:], table.keys, strict=False):
                draw_metric(axes, table, key, colors)
        figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def draw_curves(axes: Any, table: Table, colors: dict[Configuration, str], title: str) -> None:
    """Losses of all runs, dotted where a run has not finished; those of training thin, if there is space."""
    late, ranked = [], {job: one for one in reversed(table.ranked) for job in one.jobs}
    for job in [*(job for job in table.jobs if job not in ranked), *ranked]:  # the best on top
        color, line = colors.get(ranked.get(job), GRAY), "-" if job.status == "finished" else ":"
        steps, losses = job.curve("val/loss")
        axes.plot(steps, losses, line, color=color, linewidth=1.3, marker="." if len(steps) < 30 else "")
        if len(table.jobs) <= 6:
            axes.plot(*job.curve("train/loss"), line, color=color, linewidth=0.5, alpha=0.5)
        late += losses[max(1, len(losses) // 4) :]
    if late and (span := max(late) - min(late)):  # beside the first fall, all differences would be small
        legend = 0.09 * (len(colors) + 1)  # above the curves
        axes.set_ylim(min(late) - 0.05 * span, max(late) + (0.05 + legend) * span)
    for one, color in colors.items():
        name = assignments({key.rpartition(".")[2]: value for key, value in one.values.items()})
        axes.plot([], [], color=color, label=label(name, 44))
    if len(table.ranked) > len(colors):
        axes.plot([], [], color=GRAY, label=f"{len(table.ranked) - len(colors)} more")
    axes.legend(edgecolor="none", framealpha=0.7, fontsize=7, loc="upper right")
    axes.set_title(label(title, 70), loc="left", fontsize=8)
    set_style(axes, "optimizer steps", "val/loss" + " (thin: train/loss)" * (len(table.jobs) <= 6))


def draw_metric(axes: Any, table: Table, key: str, colors: dict[Configuration, str]) -> None:
    """Each seed, and a line through the means of all configurations with the same value."""
    ordered = sorted(table.ranked, key=lambda one: table.jobs.index(one.jobs[0]))
    values = [one.values[key] for one in ordered]
    numeric = all(map(is_number, values))
    means: dict[Any, list[float]] = {}
    for one, value in zip(ordered, values, strict=True):
        x = value if numeric else label(shown(value), 40)  # strings are categories
        axes.plot([x] * len(one.scores), list(one.scores.values()), "o", color=colors.get(one, GRAY), markersize=4)
        means.setdefault(x, []).append(one.mean)
    if means and (len(table.keys) == 1 or len(means) < len(values)):  # not of a random search, where it would be noise
        line = [(x, statistics.fmean(means[x])) for x in (sorted(means) if numeric else means)]
        axes.plot(*zip(*line, strict=True), "-" if numeric else "--", color="black", linewidth=1, zorder=1)
    if numeric and means and min(means) > 0 and max(means) / min(means) >= 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if numeric and len(means) <= 6:
        axes.set_xticks(list(means), map(shown, means))
        axes.minorticks_off()
    set_style(axes, key, f"{table.metric} ({table.at})")


def set_style(axes: Any, x: str, y: str) -> None:
    axes.set_axis_on()
    axes.set_xlabel(label(x, 60))
    axes.set_ylabel(label(y, 60))
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
