"""SIGKILL a training run 25 times, resume it each time, and compare its end bitwise with an uninterrupted run.

    python scripts/kill_storm.py [KEY=VALUE ...]

Both runs have dropout, uneven micro-batches, averaged weights, validations and early stopping. A callback reports over
a pipe where the run is, so that a kill is known to have hit the inside of a validation or of a checkpoint write; one
that missed does not count and is repeated. Four more kills hit resumes before their first step. After every kill all
files of the run must be intact, and every resume must start later than the one before.
"""

import argparse
import itertools
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlab import checkpoint

VAL_EVERY, SAVE_EVERY = 60, 16
OVERRIDES = [
    "hydra.run.dir=run", "hardware=cpu", "trainer.precision=32", "model=gpt-nano", "model.dropout=0.2",
    "data.micro_batch_size=5", "callbacks=[early_stopping,ema]", "callbacks.early_stopping.patience=20",
    "callbacks.early_stopping.min_delta=0.02", f"trainer.val_every={VAL_EVERY}",
    f"trainer.checkpoint_every={SAVE_EVERY}", "trainer.log_every=7",
]  # fmt: skip
TOKENS_PER_STEP = 12 * 64  # of the default data
PHASES = {  # of a process's life: the events between which it lies
    "training": ("step", "step"),
    "validation": ("validation begins", "validation ends"),
    "checkpoint write": ("write begins", "write ends"),
    "start-up": ("launch", "start"),
}
PIPE = "KILL_STORM_PIPE"
# Lightning's entry point for callbacks: the reporter is in every process, but not in the config of the run.
ENTRY_POINT = "[lightning.pytorch.callbacks_factory]\nkill_storm = kill_storm:Reporter\n"
TIMEOUT = 600  # seconds within which the killed run must get to the place of the next kill
SPEED = ("watch/tokens_per_s", "watch/data_wait", "tokens_per_s", "seconds")  # differs between any two runs
Event = tuple[str, int, float]  # what, finished steps, time in seconds


class Reporter(L.Callback):
    """Writes a line `what,finished steps` into the pipe for each event; does nothing without a pipe."""

    def __init__(self) -> None:
        self.pipe = int(os.environ.get(PIPE, -1))

    def report(self, what: str, trainer: L.Trainer) -> None:
        if self.pipe >= 0 and not trainer.sanity_checking:
            os.write(self.pipe, f"{what},{trainer.global_step}\n".encode())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = trainer.strategy.checkpoint_io.save_checkpoint

        def save_and_report(*arguments: Any, **options: Any) -> None:
            self.report("write begins", trainer)
            save(*arguments, **options)
            self.report("write ends", trainer)

        trainer.strategy.checkpoint_io.save_checkpoint = save_and_report

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report("start", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.report("step", trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report("validation begins", trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report("validation ends", trainer)


def start(folder: Path, overrides: list[str], pipe: int | None = None) -> subprocess.Popen:
    """Start or resume the run in `folder`, in a process group of its own (with data.workers)."""
    arguments = ["resume=run"] if (folder / "run/config.yaml").exists() else overrides
    entry_point = folder.parent / "kill_storm-0.dist-info/entry_points.txt"
    entry_point.parent.mkdir(exist_ok=True)
    entry_point.write_text(ENTRY_POINT)
    paths = [str(Path(__file__).parent), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if pipe is not None:
        environment[PIPE] = str(pipe)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gptlab.train", *arguments],
            cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True,
            pass_fds=[] if pipe is None else [pipe],
        )  # fmt: skip


def finish(folder: Path, overrides: list[str]) -> Path:
    """Start or resume the run and let it finish; returns the run folder."""
    if start(folder, overrides).wait() != 0:
        sys.exit(f"the run failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return folder / "run"


class Storm:
    """Kills the run in `folder` again and again."""

    def __init__(self, folder: Path, overrides: list[str], rng: random.Random) -> None:
        self.folder, self.overrides, self.rng = folder, overrides, rng
        self.step = self.saved = -1  # at the last kill
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}  # durations so far

    def kill_in(self, phase: str, step: int) -> bool:
        """Resume the run and kill it in the first such phase after `step` (later if the run would not have saved again
        by then; ignored for a start-up); returns whether the kill hit that phase.

        Raises:
            SystemExit: a file is broken, or the run made no progress since the last kill.
        """
        resumed_from, first_event = max(self.saved, 0), PHASES[phase][0]
        step = 0 if phase == "start-up" else max(step, self.step + 2 * SAVE_EVERY)
        events = self.run_and_kill(phase, resumed_from, step)
        (what, killed_at, _), saved = events[-1], check_files(self.folder / "run")
        hit = phase == "training" or what == first_event
        print(f"{phase}: step {killed_at} ({what}), resumes from {saved}{'' if hit else ': missed'}", flush=True)
        if events[1:] and events[1][:2] != ("start", resumed_from):
            sys.exit(f"resumed from {events[1][:2]}, not from {resumed_from}")
        if phase != "start-up" and (killed_at <= self.step or saved <= self.saved):
            sys.exit(f"no progress since the kill at step {self.step}, checkpoint {self.saved}")
        self.step, self.saved = max(killed_at, self.step), saved
        return hit

    def run_and_kill(self, phase: str, resumed_from: int, step: int) -> list[Event]:
        """All events of the process, which is killed at a random moment of the phase."""
        (reading, writing), first_event = os.pipe(), PHASES[phase][0]
        events = [("launch", resumed_from, time.perf_counter())]
        process = start(self.folder, self.overrides, writing)
        os.close(writing)
        watchdog = threading.Timer(TIMEOUT, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.daemon = True
        watchdog.start()
        with os.fdopen(reading) as pipe:
            stream = ((what, int(at), time.perf_counter()) for what, at in (line.split(",") for line in pipe))
            while (events[-1][0] != first_event or events[-1][1] < step) and (event := next(stream, None)):
                events.append(event)
            reached = events[-1][0] == first_event
            self.record_durations(events)
            time.sleep(self.rng.random() * statistics.median(self.seconds[phase] or [0.0]))
            os.killpg(process.pid, signal.SIGKILL)
            events += stream
        watchdog.cancel()
        if process.wait() != -signal.SIGKILL or not reached:
            output = (self.folder / "output.txt").read_text()[-3000:]
            sys.exit(f"the run hung, or ended by itself with status {process.returncode}; its output:\n{output}")
        return events

    def record_durations(self, events: list[Event]) -> None:
        for (what, _, began), (next_what, _, ended) in itertools.pairwise(events):
            for phase, bounds in PHASES.items():
                if (what, next_what) == bounds:
                    self.seconds[phase].append(ended - began)


def check_files(run: Path) -> int:
    """The step from which the run will resume.

    Raises:
        SystemExit: a file of the run is broken.
    """
    try:
        saved = {path.stem: checkpoint.read(path)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
        for text in [(run / "run.json").read_text("utf-8"), *(line for line in lines if line.endswith("\n"))]:
            json.loads(text)
    except ValueError as error:
        sys.exit(f"a broken file: {error}")
    return next((saved[name] for name in ("last", "previous", "best") if name in saved), 0)


def plan_kills(rng: random.Random, kills: list[int], start_ups: int, steps: int) -> list[tuple[str, int]]:
    """(phase, step): so many kills per phase in random order, each in its own stretch of the run, and those of
    start-ups in between."""
    phases = [phase for phase, count in zip(PHASES, kills, strict=False) for _ in range(count)]
    if steps < (least := 2 * VAL_EVERY + 3 * SAVE_EVERY * len(phases)):
        sys.exit(f"{steps} steps are too few for {len(phases)} kills; needs >= {least}")
    rng.shuffle(phases)
    bounds = [1 + i * (steps - 2 * VAL_EVERY) // len(phases) for i in range(len(phases) + 1)]
    plan = [(phase, rng.randrange(*stretch)) for phase, stretch in zip(phases, itertools.pairwise(bounds), strict=True)]
    for _ in range(start_ups):
        plan.insert(rng.randint(1, len(plan)), ("start-up", 0))
    return plan


def load_results(run: Path) -> dict[str, Any]:
    """Everything that a run leaves, except its speed."""
    results: dict[str, Any] = {path.name: checkpoint.read(path) for path in run.glob("checkpoints/*.ckpt")}
    for saved in results.values():
        saved["callbacks"].pop("Timer", None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of resumes
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()  # 0: all of them
    tags = set(events.Tags()["scalars"]) - set(SPEED)
    results["tensorboard"] = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    results["metrics.jsonl"] = [line for line in lines if "train/tokens_per_s" not in line]
    results["summary.json"] = {key: value for key, value in summary.items() if key not in SPEED}
    return results


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested dicts and lists: tensors as bytes, numbers with all their digits."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{path}/{key}")
    else:
        is_tensor = isinstance(tree, torch.Tensor)
        yield path, (tree.dtype, tree.shape, tree.numpy().tobytes()) if is_tensor else repr(tree)


def differences(a: Any, b: Any) -> list[str]:
    """The paths at which two such trees differ, if only in the last bit."""
    a, b = dict(flatten(a)), dict(flatten(b))
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="for both runs, such as data.workers=2")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--kills", type=int, nargs=3, default=[17, 3, 5], metavar=("TRAINING", "VALIDATION", "WRITE"))
    parser.add_argument("--start-ups", type=int, default=4, help="further kills, of resumes before their first step")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    folder, rng, total = Path(tempfile.mkdtemp(prefix="kill_storm_")), random.Random(options.seed), sum(options.kills)
    print(f"in {folder}, which is kept if anything fails", flush=True)
    overrides = [*OVERRIDES, f"trainer.max_steps={options.steps}", *options.overrides]
    for name in ("uninterrupted", "killed"):
        (folder / name).mkdir()
    uninterrupted = finish(folder / "uninterrupted", overrides)
    summary = json.loads((uninterrupted / "summary.json").read_text("utf-8"))
    seconds = summary["steps"] * TOKENS_PER_STEP / summary["tokens_per_s"]
    print(f"uninterrupted: {summary['steps']} steps in {seconds:.0f} s, ended by {summary['ended']}", flush=True)
    storm, number = Storm(folder / "killed", overrides, rng), 0
    for phase, step in plan_kills(rng, options.kills, options.start_ups, summary["steps"]):
        number += phase != "start-up"
        print("not counted" if phase == "start-up" else f"{number} of {total}", end=", ")
        while not storm.kill_in(phase, step):
            print("    again", end=", ")
    results = load_results(finish(folder / "killed", overrides))
    if different := differences(results, load_results(uninterrupted)):
        sys.exit(f"{total} kills, and the results differ in {len(different)} places:\n" + "\n".join(different[:50]))
    shutil.rmtree(folder)
    print(f"{total} of {total} kills: no file was ever broken, and the results are bitwise those of the other run")


if __name__ == "__main__":
    main()
