"""python -m gptlab.compare FOLDER...: runs and sweeps side by side, as tables on the terminal or as files."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from gptlab import cli, results, resume, sweep
from gptlab.config import did_you_mean
from gptlab.errors import UserError
from gptlab.run import Run
from gptlab.terminal import printable

HELP = """
  python -m gptlab.compare sweeps/NAME/DATE                   a sweep, also while it runs
  python -m gptlab.compare latest                             the newest sweep or run
  python -m gptlab.compare outputs/NAME sweeps/NAME           every run and sweep below these folders
  python -m gptlab.compare sweeps name=NAME tag=TAG           those with a name or tag
  python -m gptlab.compare sweeps optim.lr=0.001,0.003        those with these values of a key

Runs that differ in seed alone are one configuration. Writes nothing but what out= asks for.

  out=FOLDER     write results.csv, results.md and results.png there
  metric=NAME    what is compared; by default val/loss, where tokenizers differ val/bits_per_byte, for problems val/accuracy
  at=last        at the last validation; at=best: at the one with the lowest loss
"""
# What no run differs in, as far as its results go: the machine, and where data lie (tables compare their checksums).
IGNORED = {"trainer.val_every", "data.name", "data.url", "data.sha256", "data.file", "data.fallback", *resume.FOLLOWS,
           *resume.RESUME_MAY_CHANGE} - {"trainer.max_steps", "trainer.max_time", "optim.decay_steps", "optim.skip_nonfinite"}  # fmt: skip
SHOWN_ONLY = ("callbacks.progress.", "callbacks.sample_text.")


def compare(arguments: list[str]) -> None:
    """Raises UserError for arguments that name no folder, no run or no metric."""
    paths = [argument for argument in arguments if Path(argument).exists() or "=" not in argument]
    settings = dict(argument.split("=", 1) for argument in arguments if argument not in paths)
    metric, at, out = settings.pop("metric", None), settings.pop("at", "last"), settings.pop("out", None)
    if at not in ("last", "best"):
        raise UserError(f"at={at}: must be last or best")
    if not paths:
        raise UserError("no folder given; python -m gptlab.compare FOLDER... (such as sweeps or outputs)")
    jobs = select([job for path in paths for job in find_jobs(Path(path))], settings)
    metrics = dict.fromkeys(name for job in jobs for name in job.measured(at))
    if metric is not None and metric not in metrics:
        raise UserError(f"metric={metric}: no such metric; measured: {', '.join(metrics) or 'none yet'}")
    varied = varied_keys(jobs)
    for job in jobs:
        job.values.update({key: job.config[key] for key in varied if key in job.config})
    title = " ".join([*paths, *(f"{key}={value}" for key, value in settings.items())])
    if out is None:
        print(results.markdown(title, jobs, results.make_tables(jobs, varied, metric, at), varied))
        return
    folder = Path(out).expanduser()
    try:
        if not is_free(folder):
            raise UserError(f"out={out} holds other files than a comparison; name another folder")
        print(results.write(folder, title, jobs, varied, metric, at))
    except OSError as error:
        raise UserError(f"out={out}: {error.strerror}; name another folder") from None
    print(f"written: {Run(folder)}/results.csv, results.md, results.png")


def is_free(folder: Path) -> bool:
    """Whether it is new, empty, or holds an earlier comparison alone."""
    names, table = set(os.listdir(folder)) if folder.exists() else set(), folder / "results.csv"
    ours = {"results.csv", "results.md", "results.png"}
    return not names or (names <= ours and table.is_file() and table.read_bytes().startswith(b"folder,status,"))


def find_jobs(path: Path) -> list[results.Job]:
    """The run `path`, or all jobs of sweeps and runs below it."""
    path = path.expanduser()
    if str(path) == "latest":
        path = sweep.find(["resume=latest"]) or Run.find("latest").folder
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; folders such as sweeps, or latest; settings are KEY=VALUE")
    jobs: dict[Path, dict[str, Any]] = {}  # folder -> values that its sweep varied
    for index in sorted(path.rglob("sweep.json")):
        try:
            jobs |= {index.parent / job.folder: job.values for job in sweep.Sweep.read(index.parent).jobs}
        except UserError as error:
            print(f"warning: {printable(str(error))}", file=sys.stderr)
    for name in ("run.json", "summary.json"):
        for file in sorted(path.rglob(name)):
            jobs.setdefault(file.parent, {})
    if (path / "config.yaml").exists():
        jobs.setdefault(path, {})
    if not jobs:
        raise UserError(f"{path} holds no runs or sweeps")
    return [results.read_job(folder, str(Run(folder)), values) for folder, values in jobs.items()]


def select(jobs: list[results.Job], settings: dict[str, str]) -> list[results.Job]:
    """The jobs, each once, that have these names, tags and values."""
    jobs = list({job.folder.resolve(): job for job in jobs}.values())
    for key, wanted in settings.items():
        full = "tags" if key == "tag" else key
        found = {job: {**job.values, **job.config} for job in jobs}
        values = {job: known[full] for job, known in found.items() if full in known}
        if not values:
            known = list(dict.fromkeys(name for known in found.values() for name in known))
            raise UserError(f"unknown key {key}{did_you_mean(key, known)}")
        jobs = [job for job, value in values.items() if any(equal(value, text) for text in wanted.split(","))]
        if not jobs:
            differing = sorted({results.shown(value) for value in values.values()})
            raise UserError(f"{key}={wanted}: no such run; the runs have {', '.join(differing)}")
    return jobs


def equal(value: Any, text: str) -> bool:
    """Whether a value is the one written; a list, whether it holds it."""
    if isinstance(value, list):
        return any(equal(item, text) for item in value)
    try:
        return results.written(value) == text or (results.is_number(value) and float(text) == value)
    except ValueError:
        return False


def varied_keys(jobs: list[results.Job]) -> list[str]:
    """Keys that change what a run computes, and differ among the finished ones, if there are two."""
    finished = [job.config for job in jobs if job.status == "finished"]
    configs = finished if len(finished) > 1 else [job.config for job in jobs if job.config]
    keys = sorted(dict.fromkeys(key for config in configs for key in config), key=lambda key: key == "seed")  # last
    return [
        key
        for key in keys
        if key.startswith((*resume.OF_A_STEP, "init_from")) and key not in IGNORED and not key.startswith(SHOWN_ONLY)
        and not (key.endswith("._target_") and key != "model._target_")
        and len({str(config.get(key)) for config in configs}) > 1
    ]  # fmt: skip


def main() -> None:
    cli.prepare_process()
    description = "Compare runs and sweeps."
    parser = argparse.ArgumentParser("python -m gptlab.compare", None, description, HELP, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("arguments", nargs="*", metavar="FOLDER | KEY=VALUE")
    parser.error = cli._refuse_flags
    with cli.errors_as_text():
        compare(parser.parse_args().arguments)


if __name__ == "__main__":
    main()
