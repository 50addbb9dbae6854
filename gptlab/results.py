"""What came of runs: results.csv, results.md and results.png, made from run folders alone.

run folders -> Job each -> Tables of comparable ones -> Configurations (jobs that differ in seed alone), best first
"""

import csv
import io
import json
import math
import os
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

STOPPING = ("trainer.max_steps", "trainer.max_time", "callbacks.early_stopping.")
POWER = (
    "With 5 configurations, a lead of 2 standard deviations of the paired differences is seen in 11 % of cases with 3 "
    "seeds, in 74 % with 5."
)
COLORS = ("#4269d0", "#e8862e", "#3a9e6d", "#c4473f", "#8a5cc2", "#97bbf5", "#9c6b4e", "#d45fa6")  # the best ones'


@dataclass(frozen=True, eq=False)
class Job:
    """A run, or the job of a sweep that may become one. Anyone may have written what it holds."""

    folder: Path
    name: str  # of the folder, for people
    status: str  # finished, pruned, failed, interrupted, running, waiting or damaged
    values: dict[str, Any]  # of the varied keys
    config: dict[str, Any]  # of every key; {} before the run has started
    about: dict[str, Any]  # run.json
    summary: dict[str, Any]
    error: str

    def score(self, metric: str, at: str) -> float | None:
        """The metric of a finished run; None where it is not finite."""
        return number(mapping(self.summary.get(at)).get(metric)) if self.status == "finished" else None

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and finite values in metrics.jsonl."""
        entries: list[Any] = []
        with suppress(OSError, UserError):
            entries = read_metrics(self.folder / "metrics.jsonl")
        points = [(number(entry.get("step")), number(entry.get(metric))) for entry in map(mapping, entries)]
        points = [point for point in points if None not in point]
        return [step for step, _ in points], [value for _, value in points]

    def agreement(self) -> dict[str, str]:
        """What runs must agree in for their metrics to compare."""
        record, limit = mapping(self.about.get("data")), number(self.config.get("data.val_windows"))
        validated = "all of it"
        if limit is not None:  # how much text that is depends on the tokenizer
            tokens = limit * (number(self.config.get("data.block_size")) or 1)
            validated = f"first {tokens:.0f} tokens (vocabulary {self.about.get('vocabulary_sha256')!s:.8})"
        rule = [(key, value) for key, value in self.config.items() if key.startswith(STOPPING) and value is not None]
        return {
            "data": " ".join(f"{record[key]!s:.12}" for key in sorted(record) if key != "name"),
            "validation": validated,
            "stopping rule": assignments((key, value) for key, value in rule if not key.endswith("_target_")),
        }


@dataclass(frozen=True, eq=False)
class Configuration:
    """Jobs that differ in `seed` alone."""

    values: dict[str, Any]
    jobs: list[Job]
    scores: dict[str, float]  # by seed, of its ranked jobs

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores.values())

    def __str__(self) -> str:
        return assignments(self.values.items())


@dataclass(frozen=True, eq=False)
class Table:
    """Comparable jobs; the configurations of those that can be ranked, best first."""

    agreement: dict[str, str]
    keys: list[str]  # that vary in it, without seed
    metric: str
    at: str
    jobs: list[Job]
    ranked: list[Configuration]


def update(folder: Path, running: Collection[str] = frozenset(), picture: bool = True) -> str:
    """Bring the results of a sweep up to date; `running` are folders of jobs that run now. Returns results.md."""
    sweep = read_sweep(folder)
    jobs = [
        read_job(folder / job["folder"], job["folder"], job["values"], job["folder"] in running)
        for job in sweep["jobs"]
    ]
    title = "/".join(folder.resolve().parts[-2:])
    return write(folder, title, jobs, sweep["varied"], sweep["metric"], sweep["at"], picture)


def write(
    folder: Path, title: str, jobs: list[Job], varied: Sequence[str], metric: str | None, at: str, picture: bool = True
) -> str:
    """Write what has changed of the three files, and return results.md. All that it says is made from results.csv: where
    that is the same, nothing is imported, computed or drawn."""
    tables = make_tables(jobs, varied, metric, at)
    table, report, png = (folder / f"results.{suffix}" for suffix in ("csv", "md", "png"))
    rows = csv_text(jobs, tables, varied, at).encode("utf-8")
    if not (table.is_file() and report.is_file() and table.read_bytes() == rows):
        report.unlink(missing_ok=True)  # a kill between the two leaves none rather than an old one
        write_atomic(table, rows)
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
    run, reason = Run(folder), folder / "error.txt"
    config, summary, status, error = {}, run.read_summary(), "waiting", ""
    try:
        if summary is None and (folder / "summary.json").exists():
            raise UserError("cannot read summary.json")
        if summary is not None or (folder / "config.yaml").exists():
            config, status = dict(leaf_values(run.read_config())), "interrupted"
        if running:
            status = "running"
        elif summary is not None:
            status = "pruned" if summary["ended"] == "pruned" else "finished"
        elif reason.is_file():
            status, error = "failed", reason.read_text("utf-8", "replace").partition("\n")[0][:300]
    except UserError as damage:
        status, error = "damaged", str(damage)
    return Job(folder, name, status, values, config, run.read_description() or {}, summary or {}, error)


def make_tables(jobs: list[Job], varied: Sequence[str], metric: str | None, at: str) -> list[Table]:
    """A table for all jobs that agree in data, validation and stopping rule."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.config:
            groups.setdefault(str(job.agreement()), []).append(job)
    tables = []
    for group in groups.values():
        chosen = metric or default_metric([job for job in group if job.status == "finished"], at)
        keys = [key for key in varied if key != "seed"]
        if len(groups) > 1:  # what only tells the tables apart is in their headings
            keys = [key for key in keys if len({str(job.values.get(key)) for job in group}) > 1]
        configurations: dict[str, Configuration] = {}
        for job in group:
            values = {key: job.values.get(key) for key in keys}
            one = configurations.setdefault(str(values), Configuration(values, [], {}))
            one.jobs.append(job)
            if (score := job.score(chosen, at)) is not None:
                one.scores[str(job.values.get("seed", job.config.get("seed")))] = score
        ranked = [one for one in configurations.values() if one.scores]
        ranked.sort(key=lambda one: one.mean, reverse=higher_is_better(chosen))
        tables.append(Table(group[0].agreement(), keys, chosen, at, group, ranked))
    return tables


def default_metric(finished: list[Job], at: str) -> str:
    if finished and all(job.score("val/accuracy", at) is not None for job in finished):
        return "val/accuracy"
    several = len({str(job.about.get("vocabulary_sha256")) for job in finished}) > 1
    return "val/bits_per_byte" if several else "val/loss"  # a loss per token depends on what a token is


def higher_is_better(metric: str) -> bool:
    return metric.endswith("accuracy")


def csv_text(jobs: list[Job], tables: list[Table], varied: Sequence[str], at: str) -> str:
    """A row for every job; its metrics are of the validation that is compared."""
    metrics = list(dict.fromkeys(name for job in jobs for name in mapping(job.summary.get(at)) if name != "step"))
    compared = {job: f"{table.metric} ({at})" for table in tables for job in table.jobs}
    rows: list[dict[str, Any]] = []
    for job in jobs:
        rows.append({"folder": job.name, "status": job.status, **dict.fromkeys([*varied, *metrics])})
        rows[-1] |= {key: written(job.values[key]) for key in varied if key in job.values}
        rows[-1] |= {name: number(mapping(job.summary.get(at)).get(name)) for name in metrics}
        rows[-1] |= {"compared": compared.get(job), "steps": steps_of(job), "ended": job.summary.get("ended")}
        rows[-1] |= {key: number(job.summary.get(key)) for key in ("tokens_per_s", "seconds")}
        agreement = job.agreement() if job.config else {}
        rows[-1] |= {key: agreement.get(key) for key in ("data", "validation", "stopping rule")} | {"error": job.error}
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0] if rows else ["folder"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def steps_of(job: Job) -> float | None:
    """Finished steps, as far as they are logged."""
    return number(job.summary.get("steps")) if job.summary else next(reversed(job.curve("step")[0]), None)


def markdown(title: str, jobs: list[Job], tables: list[Table], varied: Sequence[str]) -> str:
    counts = Counter(job.status for job in jobs)
    lines = [f"# {cell(title)}: {len(jobs)} runs, {', '.join(f'{n} {status}' for status, n in counts.items())}", ""]
    tables = [table for table in tables if table.ranked]
    differing = [key for key in ("data", "validation", "stopping rule") if len({t.agreement[key] for t in tables}) > 1]
    if differing:
        lines += [f"{len(tables)} tables, because runs with another {' or '.join(differing)} do not compare.", ""]
    for table in tables:
        if differing:
            name = mapping(table.jobs[0].about.get("data")).get("name")
            lines += [f"## {cell(name)}; {cell('; '.join(f'{key}: {table.agreement[key]}' for key in differing))}", ""]
        better = "higher" if higher_is_better(table.metric) else "lower"
        lines += [f"{cell(table.metric)} at the {table.at} validation, {better} is better:", ""]
        lines += [grid(ranking(table)), "", *verdict(table.ranked), ""]
    measured = {job for table in tables for job in table.jobs if job.score(table.metric, table.at) is not None}
    if rest := [job for job in jobs if job not in measured]:
        rows: list[list[Any]] = [[*varied, "steps", "status", "folder", "why"]]
        for job in rest:
            why = "no finite metric to compare" if job.status == "finished" else job.error
            values = [job.values.get(key, "") for key in varied]
            rows.append([*values, "" if (n := steps_of(job)) is None else n, job.status, job.name, why])
        lines += ["Not ranked:", "", grid(rows), ""]
    return "\n".join(lines)


def ranking(table: Table) -> list[list[Any]]:
    """Rows of the Markdown table."""
    rows = [[*table.keys, table.metric, "spread", "95 % interval", "seeds", "tokens/s", "time", "status", "folders"]]
    for one in table.ranked:
        spread, interval, n = "", "", len(one.scores)
        if n > 1:
            from scipy.special import stdtrit

            deviation = statistics.stdev(one.scores.values())
            half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
            spread, interval = f"{deviation:.4f}", f"{one.mean - half:.4f} to {one.mean + half:.4f}"
        finished = [job.summary for job in one.jobs if job.status == "finished"]
        speed, time = (
            statistics.fmean(values) if (values := [value for each in finished if (value := number(each.get(key)))]) else 0
            for key in ("tokens_per_s", "seconds")
        )  # fmt: skip
        early = {job: job.summary.get("ended") for job in one.jobs if job.status == "finished"}
        states = Counter(f"{job.status} ({e})" if (e := early.get(job, "max_steps")) != "max_steps" else job.status for job in one.jobs)  # fmt: skip
        rows.append([*one.values.values(), f"{one.mean:.4f}", spread, interval, n, f"{speed:,.0f}", f"{time:,.0f} s",
                     ", ".join(f"{count} {state}" for state, count in states.items()), folders(one.jobs)])  # fmt: skip
    return rows


def verdict(ranked: list[Configuration]) -> list[str]:
    """Whether the best configuration leads *every* other beyond the noise of seeds. Against the second alone, a test would
    see a lead in up to 19 % of sweeps without any."""
    best, *others = ranked
    if not others:
        return ["One configuration: nothing to compare it with."]
    tested = [(p_value(best.scores, other.scores), other) for other in others]
    rival = next((other for p, other in tested if p is None), None)
    if rival is not None:
        return [
            f"Best: {cell(best)}; whether beyond the noise of seeds is unknown: a paired t-test against {cell(rival)} needs "
            "at least 2 common seeds, and differences that vary (more seeds: -m seed=1,2,3,4,5)."
        ]
    p, rival = max(tested, key=lambda pair: pair[0])
    beyond = "beyond" if p < 0.05 else "within"
    return [
        f"Best: {cell(best)}, {beyond} the noise of seeds: p = {p:.2g} against {cell(rival)} is the largest of paired t-tests "
        f"against every other (beyond: below 0.05). {'' if p < 0.05 else POWER}".rstrip(),
        "The interval of the best is optimistic: it was chosen for its mean.",
    ]


def p_value(a: dict[str, float], b: dict[str, float]) -> float | None:
    """Of a two-sided paired t-test over common seeds; None where it cannot be made."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if len(differences) < 2 or (spread := statistics.stdev(differences)) == 0:
        return None
    from scipy.special import stdtr

    t = statistics.fmean(differences) / spread * math.sqrt(len(differences))
    return 2 * float(stdtr(len(differences) - 1, -abs(t)))


def draw(tables: list[Table]) -> bytes:
    """A PNG: for each table the loss curves, and the metric over each of its keys."""
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    tables = tables[:6]
    size = max(1, len(tables)), 1 + max((len(table.keys[:5]) for table in tables), default=0)
    figure, file = Figure((1.5 + 4 * size[1], 3.6 * size[0]), dpi=110, layout="constrained"), io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        warnings.simplefilter("ignore")  # characters that the font lacks
        panels = figure.subplots(*size, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for row, table in zip(panels, tables, strict=False):
            colors = dict(zip(table.ranked, COLORS, strict=False))
            draw_curves(row[0], table, colors)
            for axes, key in zip(row[1:], table.keys, strict=False):
                draw_metric(axes, table, key, colors)
        figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def draw_curves(axes: Any, table: Table, colors: dict[Configuration, str]) -> None:
    configuration = {job: one for one in table.ranked for job in one.jobs}
    late: list[float] = []
    for job in reversed(table.jobs):
        style = {"color": colors.get(configuration.get(job), "#b0b0b0"), "linestyle": "-" if job.status == "finished" else ":"}  # fmt: skip
        steps, losses = job.curve("val/loss")
        axes.plot(steps, losses, linewidth=1.3, marker="." if len(steps) < 30 else "", **style)
        if len(table.jobs) <= 6:
            axes.plot(*job.curve("train/loss"), linewidth=0.5, alpha=0.5, **style)
        late += losses[max(1, len(losses) // 4) :]
    if late and (span := max(late) - min(late)):  # without the first fall, beside which all differences are small
        axes.set_ylim(min(late) - 0.05 * span, max(late) + 0.05 * span)
    for one, color in colors.items():
        axes.plot([], [], color=color, label=label(", ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in one.values.items())))  # fmt: skip
    if len(table.ranked) > len(colors):
        axes.plot([], [], color="#b0b0b0", label=f"{len(table.ranked) - len(colors)} more")
    axes.legend(frameon=False, fontsize=7, loc="upper right")
    axes.set_title(label(table.agreement["stopping rule"], 60), loc="left", fontsize=8)
    set_style(axes, "optimizer steps", "val/loss" + " (thin: train/loss)" * (len(table.jobs) <= 6))


def draw_metric(axes: Any, table: Table, key: str, colors: dict[Configuration, str]) -> None:
    """Each seed's metric over the values of a key, and a line through the means of all configurations with that value."""
    values = [one.values[key] for one in table.ranked]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    ticks = sorted(set(values)) if numeric else list(dict.fromkeys(map(shown, values)))
    means: dict[float, list[float]] = {}
    for one, value in zip(table.ranked, values, strict=True):
        x = value if numeric else ticks.index(shown(value))
        color = colors.get(one, "#b0b0b0")
        axes.plot([x] * len(one.scores), list(one.scores.values()), "o", color=color, markersize=4, alpha=0.8)
        means.setdefault(x, []).append(one.mean)
    if len(table.keys) == 1 or len(means) < len(table.ranked):  # not of a random search, where it would be noise
        line = sorted((x, statistics.fmean(same)) for x, same in means.items())
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, zorder=1, linestyle="-" if numeric else "--")
    if numeric and ticks[:1] > [0] and ticks[-1] / ticks[0] >= 8:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if ticks and (not numeric or len(ticks) <= 6):
        axes.set_xticks(ticks if numeric else range(len(ticks)), [label(shown(tick), 20) for tick in ticks])
        axes.minorticks_off()
    set_style(axes, key, f"{table.metric} ({table.at})")


def set_style(axes: Any, x: str, y: str) -> None:
    axes.set_axis_on()
    axes.set_xlabel(label(x))
    axes.set_ylabel(label(y))
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def grid(rows: list[list[Any]]) -> str:
    """A Markdown table that can be read in a terminal."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    return label(shown(value), 300).replace("|", "\\|")


def label(text: str, most: int = 44) -> str:
    """One printable line."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def folders(jobs: list[Job]) -> str:
    """As a shell expands it: sweeps/NAME/DATE/{0,1,2}."""
    names: dict[str, list[str]] = {}
    for parent, name in (os.path.split(job.name) for job in jobs):
        names.setdefault(parent, []).append(name)
    return " ".join(
        os.path.join(parent, f"{{{','.join(some)}}}" if some[1:] else some[0]) for parent, some in names.items()
    )


def assignments(items: Any) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in items)


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else written(value)


def written(value: Any) -> str:
    """As on the command line."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def number(value: Any) -> float | None:
    """A finite number in JSON or YAML from outside."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
