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
from gptlab.run import ERROR, Run, read_metrics, write_atomic
from gptlab.sweep import Sweep
from gptlab.terminal import printable

STOPPING = ("trainer.max_steps", "trainer.max_time", "callbacks.early_stopping.")


@dataclass(frozen=True, eq=False)
class Job:
    """A run, or the job of a sweep that may become one. Its contents are untrusted."""

    folder: Path
    name: str  # of the folder, for people
    status: str  # finished, pruned, failed, interrupted, running, waiting or damaged
    values: dict[str, Any]  # of the varied keys
    config: dict[str, Any]  # of every key; {} before the run has started
    about: dict[str, Any]  # run.json
    summary: dict[str, Any]
    error: str

    def measured(self, at: str) -> dict[str, float]:
        """Finite metrics of the last or best validation."""
        metrics = self.summary.get(at)
        items = metrics.items() if isinstance(metrics, dict) else ()
        return {name: value for name, value in items if is_number(value) and name != "step"}

    def score(self, metric: str, at: str) -> float | None:
        return self.measured(at).get(metric) if self.status == "finished" else None

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and finite values in metrics.jsonl."""
        points: list[tuple[float, float]] = []
        with suppress(OSError, UserError, RecursionError):
            entries = [entry for entry in read_metrics(self.folder / "metrics.jsonl") if isinstance(entry, dict)]
            points = [(entry.get("step"), entry.get(metric)) for entry in entries]
        points = [point for point in points if all(map(is_number, point))]
        return [step for step, _ in points], [value for _, value in points]

    def steps(self) -> float | None:
        """Finished steps, as far as they are logged."""
        return self.summary["steps"] if self.summary else next(reversed(self.curve("step")[0]), None)

    def agreement(self) -> dict[str, str]:
        """What runs must agree in for their metrics to compare."""
        record, windows = self.about.get("data"), self.config.get("data.val_windows")
        record = record if isinstance(record, dict) else {}
        validation = "all of it"
        if windows is not None:  # how much text that is depends on the tokenizer
            vocabulary = str(self.about.get("vocabulary_sha256"))[:8]
            validation = f"{windows} windows of {self.config.get('data.block_size')} tokens (vocabulary {vocabulary})"
        rule = {key: value for key, value in self.config.items() if key.startswith(STOPPING) and value is not None}
        return {
            "data": " ".join(str(record[key])[:12] for key in sorted(record) if key != "name"),
            "validation": validation,
            "stopping rule": assignments({key: rule[key] for key in rule if not key.endswith("_target_")}),
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


@dataclass(frozen=True, eq=False)
class Table:
    """Comparable jobs; the configurations of those that can be ranked, best first."""

    agreement: dict[str, str]
    keys: list[str]  # that vary in it, without seed
    metric: str
    at: str
    jobs: list[Job]
    ranked: list[Configuration]


def update(sweep: Sweep, running: Collection[str] = frozenset(), picture: bool = True) -> str:
    """Bring the results of a sweep up to date; `running` are folders of jobs that run now. Returns results.md."""
    jobs = [read_job(sweep.folder / j.folder, j.folder, j.values, j.folder in running) for j in sweep.jobs]
    title = "/".join(sweep.folder.resolve().parts[-2:])
    return write(sweep.folder, title, jobs, sweep.varied, sweep.metric, sweep.at, picture)


def write(
    folder: Path, title: str, jobs: list[Job], varied: Sequence[str], metric: str | None, at: str, picture: bool = True
) -> str:
    """Write what has changed of the three files, and return results.md. All that it says is made from what results.csv
    holds: where that is the same, nothing is imported, computed or drawn."""
    tables = make_tables(jobs, varied, metric, at)
    table, report, png = (folder / f"results.{suffix}" for suffix in ("csv", "md", "png"))
    rows = csv_text(jobs, tables, varied, at).encode("utf-8")
    if not (table.is_file() and report.is_file() and table.read_bytes() == rows):
        report.unlink(missing_ok=True)  # a kill between the two leaves none rather than an old one
        write_atomic(table, rows)
        write_atomic(report, markdown(title, jobs, tables, varied).encode("utf-8"))
    if picture and not (png.is_file() and png.stat().st_mtime_ns >= table.stat().st_mtime_ns):
        from gptlab.picture import draw

        write_atomic(png, draw(tables))
    return report.read_text("utf-8")


def read_job(folder: Path, name: str, values: dict[str, Any], running: bool = False) -> Job:
    run = Run(folder)
    config, summary, status, error = {}, run.read_summary(), run.state(), ""
    try:
        if summary is None and (folder / "summary.json").exists():
            raise UserError("cannot read summary.json")
        if summary or (folder / "config.yaml").exists():
            config = dict(leaf_values(run.read_config()))
            str(config)  # ValueError for an integer of thousands of digits
        if status == "failed":
            error = (folder / ERROR).read_text("utf-8", "replace").partition("\n")[0]
    except (ValueError, OSError) as damage:
        config, status, error = {}, "damaged", str(damage)
    status = "running" if running else status
    return Job(folder, name, status, values, config, run.read_description() or {}, summary or {}, error)


def make_tables(jobs: list[Job], varied: Sequence[str], metric: str | None, at: str) -> list[Table]:
    """One for all jobs that agree in data, validation and stopping rule."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.config:
            groups.setdefault(str(job.agreement()), []).append(job)
    tables, several = [], sum(any(job.status == "finished" for job in group) for group in groups.values()) > 1
    for group in groups.values():
        chosen = metric or default_metric([job for job in group if job.status == "finished"], at)
        keys = [key for key in varied if key != "seed"]
        if several:  # what only tells the tables apart is in their headings
            keys = [key for key in keys if len({str(job.values.get(key)) for job in group}) > 1]
        configurations: dict[str, Configuration] = {}
        for job in group:
            values = {key: job.values.get(key) for key in keys}
            one = configurations.setdefault(str(values), Configuration(values, [], {}))
            one.jobs.append(job)
            if (score := job.score(chosen, at)) is not None:
                one.scores[str(job.values.get("seed", job.config.get("seed")))] = score
        # Without its pruned seeds, the mean of a configuration would be that of the better ones.
        ranked = [one for one in configurations.values() if one.scores and all(j.status != "pruned" for j in one.jobs)]
        ranked.sort(key=lambda one: one.mean, reverse=higher_is_better(chosen))
        tables.append(Table(group[0].agreement(), keys, chosen, at, group, ranked))
    return tables


def default_metric(finished: list[Job], at: str) -> str:
    if finished and all("val/accuracy" in job.measured(at) for job in finished):
        return "val/accuracy"
    vocabularies = {str(job.about.get("vocabulary_sha256")) for job in finished}
    return "val/bits_per_byte" if len(vocabularies) > 1 else "val/loss"  # which depends on what a token is


def higher_is_better(metric: str) -> bool:
    return metric.endswith("accuracy")


def csv_text(jobs: list[Job], tables: list[Table], varied: Sequence[str], at: str) -> str:
    """A row for every job; its metrics are of the validation that is compared."""
    metrics = list(dict.fromkeys(name for job in jobs for name in job.measured(at)))
    compared = {job: f"{table.metric} ({at})" for table in tables for job in table.jobs}
    agreed = ("data", "validation", "stopping rule")
    columns = ("folder", "status", *varied, *metrics, "steps", "ended", "tokens_per_s", "seconds", "compared", *agreed)
    file = io.StringIO()
    writer = csv.DictWriter(file, dict.fromkeys([*columns, "error"]), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for job in jobs:
        values = {key: written(value) for key, value in job.values.items()}
        agreement = job.agreement() if job.config else {}
        row = {"folder": job.name, "status": job.status, "compared": compared.get(job), "error": job.error}
        writer.writerow({**job.summary, **row, "steps": job.steps(), **job.measured(at), **agreement, **values})
    return file.getvalue()


def markdown(title: str, jobs: list[Job], tables: list[Table], varied: Sequence[str]) -> str:
    counts = Counter(job.status for job in jobs)
    lines = [f"# {cell(title)}: {len(jobs)} runs, {', '.join(f'{n} {status}' for status, n in counts.items())}", ""]
    tables = [table for table in tables if table.ranked]
    differing = differences(tables)
    if differing:
        lines += [f"{len(tables)} tables, because runs with another {' or '.join(differing)} do not compare.", ""]
    for table in tables:
        if differing:
            lines += ["## " + cell("; ".join(f"{key}: {table.agreement[key]}" for key in differing)), ""]
        better = "higher" if higher_is_better(table.metric) else "lower"
        lines += [f"{cell(table.metric)} at the {table.at} validation, {better} is better:", ""]
        lines += [grid(ranking(table)), "", *verdict(table.ranked), ""]
    configurations = [(table, one) for table in tables for one in table.ranked]
    ranked = {job for table, one in configurations for job in one.jobs if job.score(table.metric, table.at) is not None}
    rest: list[list[Any]] = [
        [*(job.values.get(key, "") for key in varied), job.steps() or 0, job.status, job.name, job.error]
        for job in jobs
        if job not in ranked
    ]
    finished = [job for job in jobs if job.status == "finished"]
    if finished and not tables:
        measured = dict.fromkeys(name for job in finished for name in job.measured("last"))
        lines += [f"No finished run has the metric compared; measured: {', '.join(map(cell, measured))}.", ""]
    if rest:
        lines += ["Not ranked:", "", grid([[*varied, "steps", "status", "folder", "error"], *rest]), ""]
    return "\n".join(lines)


def differences(tables: list[Table]) -> list[str]:
    """What keeps them apart."""
    return [key for key in tables[0].agreement if len({table.agreement[key] for table in tables}) > 1] if tables else []


def ranking(table: Table) -> list[list[Any]]:
    rows = [[*table.keys, table.metric, "spread", "95 % interval", "seeds", "tokens/s", "time", "status", "folders"]]
    for one in table.ranked:
        spread, interval, n = "", "", len(one.scores)
        if n > 1:
            from scipy.special import stdtrit

            deviation = statistics.stdev(one.scores.values())
            half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
            spread, interval = f"{deviation:.4f}", f"{one.mean - half:.4f} to {one.mean + half:.4f}"
        finished = [job for job in one.jobs if job.status == "finished"]
        numbers = (
            [value for job in finished if is_number(value := job.summary.get(key))]
            for key in ("tokens_per_s", "seconds")
        )
        speed, seconds = (f"{statistics.fmean(values):,.0f}" if values else "" for values in numbers)
        row = [f"{one.mean:.4f}", spread, interval, n, speed, f"{seconds} s"]
        states = ", ".join(f"{n} {status}" for status, n in Counter(job.status for job in one.jobs).items())
        rows.append([*one.values.values(), *row, states, folders(one.jobs)])
    return rows


def verdict(ranked: list[Configuration]) -> list[str]:
    """Whether the best configuration leads *every* other beyond the noise of seeds. A test against the second alone sees a
    lead in up to 19 % of sweeps that have none."""
    best, *others = ranked
    if not others:
        return ["One configuration: nothing to compare it with."]
    if failed := sum(job.status == "failed" for job in best.jobs):
        name = cell(assignments(best.values))
        return [f"Best: {name}, but {failed} of its {len(best.jobs)} runs failed: the mean is of the others."]
    name, optimistic = cell(assignments(best.values)), "Its interval is optimistic: it was chosen for its mean."
    tested = [(p_value(best.scores, other.scores), cell(assignments(other.values))) for other in others]
    if untested := [rival for p, rival in tested if p is None]:
        return [
            f"Best: {name}. Unknown whether beyond the noise of seeds: a paired t-test against {untested[0]} needs >= 2 "
            "common seeds, with differences that vary (-m seed=1,2,3,4,5).",
        ]
    p, rival = max(tested)
    test = f"the largest p of paired t-tests against each other configuration is {p:.2g}, against {rival}"
    if p < 0.05:
        return [f"Best: {name}, beyond the noise of seeds: {test}.", optimistic]
    return [
        f"Best: {name}, within the noise of seeds: {test}; below 0.05 would be beyond.",
        "Few seeds hide real leads: of 5 configurations, one that leads by 2 standard deviations of the paired differences is told apart in 11 % of "
        "cases with 3 seeds, in 74 % with 5.",
        optimistic,
    ]


def p_value(a: dict[str, float], b: dict[str, float]) -> float | None:
    """Of a two-sided paired t-test over common seeds; None where it cannot be made."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    if len(differences) < 2:
        return None
    spread = statistics.stdev(differences)
    if spread <= 1e-9 * max(map(abs, differences)):  # but for rounding, all the same
        return None
    from scipy.special import stdtr

    t = statistics.fmean(differences) / spread * math.sqrt(len(differences))
    return 2 * float(stdtr(len(differences) - 1, -abs(t)))


def grid(rows: list[list[Any]]) -> str:
    """A Markdown table that can be read in a terminal."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def cell(value: Any) -> str:
    return label(shown(value), 300).replace("|", "\\|")


def label(text: str, most: int) -> str:
    """One printable line."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def folders(jobs: list[Job]) -> str:
    """As a shell expands it: sweeps/NAME/DATE/{0,1,2}."""
    names: dict[str, list[str]] = {}
    for parent, name in (os.path.split(job.name) for job in jobs):
        names.setdefault(parent, []).append(name)
    joined = {parent: f"{{{','.join(some)}}}" if some[1:] else some[0] for parent, some in names.items()}
    return " ".join(os.path.join(parent, some) for parent, some in joined.items())


def assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else written(value)


def written(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def is_number(value: Any) -> bool:
    """Of JSON or YAML from outside: whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
