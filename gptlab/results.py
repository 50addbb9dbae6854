"""What came of runs: results.csv, results.md and results.png, made from run folders alone.

run folders -> Job each -> Tables of comparable ones -> Configurations (jobs that differ in seed alone), best first
"""

import csv
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptlab.errors import UserError
from gptlab.resume import leaf_values
from gptlab.run import Run, read_metrics, write_atomic
from gptlab.terminal import printable

STOPPING = ("trainer.max_steps", "trainer.max_time", "callbacks.early_stopping.monitor",
            "callbacks.early_stopping.patience", "callbacks.early_stopping.min_delta")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Job:
    """A run, or the job of a sweep that may become one. What is in `summary` and `config` may come from anyone."""

    folder: Path
    name: str  # of the folder, for people
    status: str  # finished, pruned, failed, interrupted, running, waiting or damaged
    values: dict[str, Any]  # of the varied keys
    config: dict[str, Any]  # of every key; {} before the run started
    about: dict[str, Any]  # run.json
    summary: dict[str, Any]
    error: str

    @property
    def seed(self) -> Any:
        return self.values.get("seed", self.config.get("seed"))

    def score(self, metric: str, at: str) -> float | None:
        """A metric of a finished run, where it is finite."""
        return number(mapping(self.summary.get(at)).get(metric)) if self.status == "finished" else None

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric in metrics.jsonl."""
        entries: list[Any] = []
        with suppress(OSError, UserError):
            entries = read_metrics(self.folder / "metrics.jsonl")
        points = [(number(mapping(entry).get("step")), number(mapping(entry).get(metric))) for entry in entries]
        points = [(step, value) for step, value in points if step is not None and value is not None]
        return [step for step, _ in points], [value for _, value in points]

    def agreement(self) -> dict[str, str]:
        """What two runs must agree in for their metrics to compare: validation data, predicted tokens, stopping rule."""
        record = mapping(self.about.get("data"))
        windows, length = (number(self.config.get(f"data.{key}")) for key in ("val_windows", "block_size"))
        validated = "all" if windows is None else f"first {windows * (length or 1):.0f} tokens"
        if windows is not None:  # how much text that is depends on the tokenizer
            validated += f" of vocabulary {str(self.about.get('vocabulary_sha256'))[:8]}"
        data = " ".join(str(record[key])[:12] for key in sorted(record) if key != "name")
        return {"data": data, "validation": validated} | {key: text(self.config.get(key)) for key in STOPPING}


@dataclass(frozen=True)
class Configuration:
    """Jobs that differ in `seed` alone."""

    values: dict[str, Any]
    jobs: list[Job]
    scores: dict[Any, float]  # by seed, of the jobs that are ranked

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None

    def __str__(self) -> str:
        return ", ".join(f"{key}={text(value)}" for key, value in self.values.items())

    @property
    def short(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]}={text(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Table:
    """Comparable jobs, and the configurations among them that a finished run has measured, best first."""

    agreement: dict[str, str]
    metric: str
    at: str
    keys: list[str]  # varied among its jobs, without seed
    jobs: list[Job]
    ranked: list[Configuration]

    @property
    def higher_is_better(self) -> bool:
        return self.metric.endswith("accuracy")


def update(folder: Path, running: Collection[str] = frozenset(), picture: bool = True) -> str:
    """Bring the results of a sweep up to date and return results.md. Files that would not change are not written.

    Args:
        running: folders of the jobs that run now.
        picture: whether to draw results.png again, if it is older than the table.
    """
    sweep = read_sweep(folder)
    jobs = [
        read_job(folder / job["folder"], job["folder"], job["values"], job["folder"] in running)
        for job in sweep["jobs"]
    ]
    path = folder.resolve()
    return write(
        folder, f"{path.parent.name}/{path.name}", jobs, sweep["varied"], sweep["metric"], sweep["at"], picture
    )


def write(
    folder: Path, title: str, jobs: list[Job], varied: Sequence[str], metric: str | None, at: str, picture: bool = True
) -> str:
    """Write the three files where they change; returns results.md. results.csv holds all that the others are made from,
    so that an unchanged one spares their work and its imports."""
    tables = make_tables(jobs, varied, metric, at)
    rows, table, png = csv_text(jobs, tables, varied), folder / "results.csv", folder / "results.png"
    report = folder / "results.md"
    if not (table.is_file() and report.is_file() and table.read_bytes() == rows.encode("utf-8")):
        report.unlink(missing_ok=True)  # or a kill between the two files would leave an old one
        write_atomic(table, rows.encode("utf-8"))
        write_atomic(report, markdown(title, jobs, tables, varied).encode("utf-8"))
    if picture and not (png.is_file() and png.stat().st_mtime_ns >= table.stat().st_mtime_ns):
        write_atomic(png, draw(tables))
    return report.read_text("utf-8")


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json, which anyone may have written."""
    try:
        sweep = json.loads((folder / "sweep.json").read_text("utf-8"))
        jobs = [{"folder": job["folder"], "values": dict(job["values"])} for job in sweep["jobs"]]
        if not all(isinstance(job["folder"], str) and job["folder"].isalnum() for job in jobs):
            raise ValueError("a job's folder is not a number")
        return {"metric": None, "at": "last", **sweep, "jobs": jobs, "varied": [str(key) for key in sweep["varied"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {folder / 'sweep.json'}: {error!r}") from None


def read_job(folder: Path, name: str, values: dict[str, Any], running: bool = False) -> Job:
    run, config, error = Run(folder), {}, ""
    summary, about, reason = run.read_summary(), run.read_description() or {}, folder / "error.txt"
    if summary is None and (folder / "summary.json").exists():
        error = "cannot read summary.json"
    elif summary is not None or (folder / "config.yaml").exists():
        try:
            config = dict(leaf_values(run.read_config()))
        except UserError as damage:
            error = str(damage)
    if running:
        status = "running"
    elif error:
        status = "damaged"
    elif summary is not None:
        status = "pruned" if summary["ended"] == "pruned" else "finished"
    elif reason.is_file():
        status, error = "failed", (reason.read_bytes()[:2000].decode("utf-8", "replace").splitlines() or [""])[0]
    else:
        status = "interrupted" if config else "waiting"
    return Job(folder, name, status, values, config, about, summary or {}, error)


def make_tables(jobs: list[Job], varied: Sequence[str], metric: str | None, at: str) -> list[Table]:
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.config and job.status != "damaged":
            groups.setdefault(json.dumps(job.agreement()), []).append(job)
    tables = []
    for group in groups.values():
        finished = [job for job in group if job.status == "finished"]
        chosen = metric or default_metric(finished, at)
        keys = [key for key in varied if key != "seed"]
        if len(groups) > 1:  # what differs between tables only is in their headings
            keys = [key for key in keys if len({text(job.values.get(key)) for job in group}) > 1]
        by_values: dict[str, list[Job]] = {}
        for job in group:
            by_values.setdefault(json.dumps([job.values.get(key) for key in keys], default=str), []).append(job)
        configurations = []
        for same in by_values.values():
            scores: dict[Any, list[float]] = {}
            for job in same:
                if (score := job.score(chosen, at)) is not None:
                    scores.setdefault(text(job.seed), []).append(score)
            values = {key: same[0].values.get(key) for key in keys}
            means = {seed: statistics.fmean(several) for seed, several in scores.items()}  # a run may exist twice
            configurations += [Configuration(values, same, means)] if means else []
        table = Table(group[0].agreement(), chosen, at, keys, group, configurations)
        configurations.sort(key=lambda one: one.mean, reverse=table.higher_is_better)
        tables.append(table)
    return tables


def default_metric(finished: list[Job], at: str) -> str:
    if finished and all(job.score("val/accuracy", at) is not None for job in finished):
        return "val/accuracy"
    several = len({str(job.about.get("vocabulary_sha256")) for job in finished}) > 1
    return "val/bits_per_byte" if several else "val/loss"  # a loss per token depends on what a token is


def csv_text(jobs: list[Job], tables: list[Table], varied: Sequence[str]) -> str:
    """A row for every job; metrics are those that its table compares by, at the same validation."""
    at = tables[0].at if tables else "last"
    metrics = list(dict.fromkeys(name for job in jobs for name in mapping(job.summary.get(at)) if name != "step"))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    agreed = ("data", "validation", *STOPPING)
    writer.writerow(["folder", "status", *varied, *metrics, "compared", "steps", "ended", "tokens_per_s", "seconds",
                     *(key for key in agreed if key not in varied), "error"])  # fmt: skip
    for job in jobs:
        compared = next((f"{table.metric} ({at})" for table in tables if job in table.jobs), "")
        agreement = job.agreement() if job.config else {}
        summary = job.summary
        writer.writerow([
            job.name, job.status, *(text(job.values.get(key)) for key in varied),
            *(number(mapping(summary.get(at)).get(name)) for name in metrics), compared, reached(job),
            summary.get("ended"), number(summary.get("tokens_per_s")), number(summary.get("seconds")),
            *(agreement.get(key) for key in agreed if key not in varied), job.error,
        ])  # fmt: skip
    return file.getvalue()


def reached(job: Job) -> float | None:
    """The last step that a run has logged."""
    steps = job.curve("step")[0] if job.status != "finished" else [number(job.summary["steps"])]
    return steps[-1] if steps else None


def markdown(title: str, jobs: list[Job], tables: list[Table], varied: Sequence[str]) -> str:
    counts = Counter(job.status for job in jobs)
    lines = [f"# {cell(title)}: {len(jobs)} runs, {', '.join(f'{n} {status}' for status, n in counts.items())}", ""]
    ranked = [table for table in tables if table.ranked]
    differing = [key for key in ("data", "validation", *STOPPING) if len({t.agreement[key] for t in ranked}) > 1]
    if differing:
        lines += [f"{len(ranked)} tables, as runs compare only if these agree: {', '.join(differing)}.", ""]
    for table in ranked:
        if differing:
            heading = ", ".join(f"{key}={table.agreement[key] or 'null'}" for key in differing)
            names = sorted({text(mapping(job.about.get("data")).get("name")) for job in table.jobs})
            lines += [f"## {cell(', '.join(names))}: {cell(heading)}", ""]
        better = "higher" if table.higher_is_better else "lower"
        where = "last" if table.at == "last" else "best"
        lines += [f"{table.metric} at the {where} validation ({better} is better), best first:", ""]
        lines += [grid(ranking(table)), "", *verdict(table), ""]
    measured = {job for table in ranked for job in table.jobs if job.score(table.metric, table.at) is not None}
    unranked = [job for job in jobs if job not in measured]
    if unranked:
        rows = [[*varied, "steps", "status", "folder", "why"]]
        for job in unranked:
            why = "no finite metric to compare" if job.status == "finished" else job.error
            values = [text(job.values[key]) if key in job.values else "" for key in varied]
            step = reached(job)
            rows.append([*values, "" if step is None else text(step), job.status, job.name, why])
        lines += ["Not ranked:", "", grid(rows), ""]
    return "\n".join(lines)


def ranking(table: Table) -> list[list[str]]:
    rows = [[*table.keys, table.metric, "spread", "95 % interval", "seeds", "tokens/s", "time", "status", "folders"]]
    for one in table.ranked:
        interval, n = "", len(one.scores)
        if one.spread is not None:
            from scipy.special import stdtrit

            half = float(stdtrit(n - 1, 0.975)) * one.spread / math.sqrt(n)
            interval = f"{decimals(one.mean - half)} to {decimals(one.mean + half)}"
        finished = [job.summary for job in one.jobs if job.status == "finished"]
        speeds, times = (
            [value for summary in finished if (value := number(summary.get(key))) is not None]
            for key in ("tokens_per_s", "seconds")
        )
        counts = Counter(
            f"{job.status} ({job.summary['ended']})"
            if job.summary.get("ended") not in (None, "max_steps", "pruned")
            else job.status
            for job in one.jobs
        )
        rows.append([
            *(text(one.values[key]) for key in table.keys), decimals(one.mean),
            "" if one.spread is None else decimals(one.spread), interval, str(n),
            f"{statistics.fmean(speeds):,.0f}" if speeds else "", duration(statistics.fmean(times)) if times else "",
            ", ".join(f"{count} {status}" for status, count in counts.items()), folders([job.name for job in one.jobs]),
        ])  # fmt: skip
    return rows


def verdict(table: Table) -> list[str]:
    """Whether the best configuration is better than every other beyond the noise of seeds: the largest p counts, as that of
    the second alone would be too small, too often."""
    best, *others = table.ranked
    if not others:
        return ["One configuration: nothing to compare."]
    ps = [(p_value(best.scores, other.scores), other) for other in others]
    untested = [other for p, other in ps if p is None]
    optimistic = ["Its interval is optimistic: it was picked for being the best."] * (best.spread is not None)
    if untested:
        return [
            f"Best: {cell(best)}. Not known whether that is beyond the noise of seeds: a paired t-test against "
            f"{cell(untested[0])} takes >= 2 common seeds and differences that vary (add seeds: seed=1,2,3).",
            *optimistic,
        ]
    p, rival = max(ps, key=lambda pair: pair[0])
    n = len(best.scores.keys() & rival.scores.keys())
    tested = f"p = {p:.2g} against {cell(rival)} ({n} common seeds), the largest of paired t-tests against every other"
    if p < 0.05:
        return [f"Best: {cell(best)}, beyond the noise of seeds: {tested}.", *optimistic]
    power = "A lead of 2 standard deviations over 4 others is seen in 11 % of cases with 3 seeds, in 74 % with 5."
    return [f"Best: {cell(best)}, but within the noise of seeds: {tested}.", power, *optimistic]


def p_value(a: dict[Any, float], b: dict[Any, float]) -> float | None:
    """Of a two-sided paired t-test over the common seeds; None where there is nothing to test."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    if len(differences) < 2 or (spread := statistics.stdev(differences)) == 0:
        return None
    from scipy.special import stdtr

    t = statistics.fmean(differences) / spread * math.sqrt(len(differences))
    return 2 * float(stdtr(len(differences) - 1, -abs(t)))


def draw(tables: list[Table]) -> bytes:
    """results.png: a row per table with loss curves, and the metric over each key that varies in it."""
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    tables = [table for table in tables if table.ranked or any(job.curve("val/loss")[0] for job in table.jobs)][:6]
    columns = 1 + max((len(table.keys[:5]) for table in tables), default=0)
    figure = Figure((1.5 + 4 * columns, 3.6 * max(1, len(tables))), dpi=110, layout="constrained")
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        warnings.simplefilter("ignore")  # characters that the font lacks
        grid = figure.subplots(max(1, len(tables)), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, table in zip(grid, tables, strict=False):
            colors = draw_curves(row[0], table)
            for axes, key in zip(row[1:], table.keys, strict=False):
                draw_metric(axes, table, key, colors)
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


COLORS = ("#4269d0", "#e8862e", "#3a9e6d", "#c4473f", "#8a5cc2", "#97bbf5", "#9c6b4e", "#d45fa6", "#6cc5b0", "#c9a227")
REST = "#b0b0b0"


def draw_curves(axes: Any, table: Table) -> dict[int, str]:
    """Validation losses, those of training thin; returns the color of each configuration."""
    colors = {id(one): COLORS[rank] if rank < len(COLORS) else REST for rank, one in enumerate(table.ranked)}
    of_job = {job: one for one in table.ranked for job in one.jobs}
    start, later = [], []
    for job in reversed(table.jobs):
        one = of_job.get(job)
        color = colors[id(one)] if one else REST
        style = {"color": color, "linestyle": "-" if job.status == "finished" else ":"}
        steps, losses = job.curve("val/loss")
        axes.plot(steps, losses, linewidth=1.3, marker="." if len(steps) < 30 else "", **style)
        if len(table.jobs) <= 6:
            axes.plot(*job.curve("train/loss"), linewidth=0.5, alpha=0.5, **style)
        start += losses[:1]
        later += losses[1:]
    if later and min(later) < max(later):  # without the fall from the first loss, which would hide all differences
        low, high = min(later), min(max(later), max(start))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for one in table.ranked[: len(COLORS)]:
        axes.plot([], [], color=colors[id(one)], label=shorten(one.short))
    if len(table.ranked) > len(COLORS):
        axes.plot([], [], color=REST, label=f"{len(table.ranked) - len(COLORS)} more")
    axes.legend(frameon=False, fontsize=7)
    finish(axes, "optimizer steps", "val/loss" + " (thin: train/loss)" * (len(table.jobs) <= 6))
    return colors


def draw_metric(axes: Any, table: Table, key: str, colors: dict[int, str]) -> None:
    """The metric of each seed over the values of a key, and a line through the means of all configurations."""
    values = [one.values[key] for one in table.ranked]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    known = sorted(set(values)) if numeric else list(dict.fromkeys(map(text, values)))
    at = {value: value if numeric else i for i, value in enumerate(known)}
    means: dict[float, list[float]] = {}
    for one, value in zip(table.ranked, values, strict=True):
        x = at[value if numeric else text(value)]
        axes.plot([x] * len(one.scores), list(one.scores.values()), "o", color=colors[id(one)], markersize=4, alpha=0.8)
        means.setdefault(x, []).append(one.mean)
    if len(table.keys) == 1 or len(means) < len(table.ranked):  # else a random search, where it would be noise
        line = sorted((x, statistics.fmean(several)) for x, several in means.items())
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, zorder=0, linestyle="-" if numeric else "--")
    if numeric and known[0] > 0 and known[-1] / known[0] >= 8:
        axes.set_xscale("log")
    if not numeric or len(known) <= 6:
        axes.set_xticks([at[value] for value in known], [shorten(text(value), 20) for value in known])
        axes.minorticks_off()
    finish(axes, key, f"{table.metric} ({table.at})")


def finish(axes: Any, x: str, y: str) -> None:
    axes.set_axis_on()
    axes.set_xlabel(printable(x))
    axes.set_ylabel(printable(y))
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten(long: str, most: int = 44) -> str:
    return printable(long if len(long) <= most else f"{long[: most - 1]}…")


def grid(rows: list[list[str]]) -> str:
    """A Markdown table that reads well in a terminal, too."""
    rows = [[cell(value) for value in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    return printable(" ".join(str(value).split())).replace("|", "\\|")


def folders(names: list[str]) -> str:
    """Paths as a shell expands them: sweeps/a/{0,1,2}."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition("/")
        parents.setdefault(parent, []).append(last)
    return " ".join(
        ", ".join(last) if not parent else f"{parent}/{{{','.join(last)}}}" if last[1:] else f"{parent}/{last[0]}"
        for parent, last in parents.items()
    )


def duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def decimals(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: Any) -> float | None:
    """What JSON or YAML from outside holds, if it is a finite number."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
