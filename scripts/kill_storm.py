"""SIGKILL a training run 25 times, resume it each time, and compare its end bit for bit with that of the same run left
in peace: python scripts/kill_storm.py [SETTING=VALUE ...]

Both runs have dropout, uneven micro-batches, averaged weights, validations and early stopping on. A callback of theirs
tells over a pipe where the run is, which is how a kill is known to have hit the inside of a validation or of the
writing of a checkpoint; one that missed is not counted and drawn again. Further kills hit resumes before their first
step. After every kill all files of the run must be whole, and each resume must start later than the one before.
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
from gptlab.run import Run

VAL_EVERY, SAVE_EVERY = 60, 16
SETTINGS = [
    "hydra.run.dir=run", "hardware=cpu", "trainer.precision=32", "model=gpt-nano", "model.dropout=0.2",
    "data.micro_batch_size=5", "callbacks=[early_stopping,ema]", "callbacks.early_stopping.patience=20",
    "callbacks.early_stopping.min_delta=0.02", "callbacks.sample_text.max_new_tokens=20",
    "+callbacks.storm._target_=kill_storm.Hook", f"trainer.val_every={VAL_EVERY}",
    f"trainer.checkpoint_every={SAVE_EVERY}", "trainer.log_every=7",
]  # fmt: skip
TOKENS_PER_STEP = 12 * 64  # of the default data
PARTS = {  # of a process's life: what is told when one begins and when it is over
    "training": ("step", "step"),
    "validation": ("validation begins", "validation is over"),
    "checkpoint write": ("write begins", "write is over"),
    "start-up": ("launch", "start"),
}
PIPE = "KILL_STORM_PIPE"
HANGS = 600  # seconds after which a process of the storm must have been killed
SPEED = ("train/tokens_per_s", "train/data_wait", "tokens_per_s", "seconds")  # what no two runs have in common


class Hook(L.Callback):
    """Tells the killer where the run is, a line for each event: what, and how many steps are done. Idle without one."""

    def __init__(self) -> None:
        self.pipe = int(os.environ.get(PIPE, -1))

    def tell(self, what: str, trainer: L.Trainer) -> None:
        if self.pipe >= 0 and not trainer.sanity_checking:
            os.write(self.pipe, f"{what},{trainer.global_step}\n".encode())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = trainer.strategy.checkpoint_io.save_checkpoint

        def told_save(*arguments: Any, **options: Any) -> None:
            self.tell("write begins", trainer)
            save(*arguments, **options)
            self.tell("write is over", trainer)

        trainer.strategy.checkpoint_io.save_checkpoint = told_save

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tell("start", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell("step", trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tell("validation begins", trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tell("validation is over", trainer)


def start(folder: Path, settings: list[str], pipe: int | None = None) -> subprocess.Popen:
    """Train in `folder`, or go on with the run that is there, in a process group of its own (with data.workers)."""
    arguments = ["resume=run", "trust=true"] if (folder / "run/config.yaml").exists() else settings
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    if pipe is not None:
        environment[PIPE] = str(pipe)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gptlab.train", *arguments],
            cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True,
            pass_fds=[] if pipe is None else [pipe],
        )  # fmt: skip


def to_the_end(folder: Path, settings: list[str]) -> Path:
    """Train in peace; the run's folder."""
    if start(folder, settings).wait() != 0:
        sys.exit(f"the run failed:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return folder / "run"


class Storm:
    """Kills the run in `folder` again and again."""

    def __init__(self, folder: Path, settings: list[str], rng: random.Random) -> None:
        self.folder, self.settings, self.rng = folder, settings, rng
        self.step = self.saved = -1  # at the last kill
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}  # that each took so far

    def strike(self, part: str, step: int) -> bool:
        """Kill the run in the first such part after that step; says whether it was hit. The step is put off if the run
        would not have saved anew by then; a start-up has none.

        Raises:
            SystemExit: a file is broken, or the run got no further than at the last kill.
        """
        came_from, begins = max(self.saved, 0), PARTS[part][0]
        told = self._killed(part, came_from, 0 if part == "start-up" else max(step, self.step + 2 * SAVE_EVERY))
        (what, at, _), saved = told[-1], whole_files(self.folder / "run")
        hit = part == "training" or what == begins
        print(f"{part}: step {at} ({what}), resumes from {saved}{'' if hit else ': missed'}", flush=True)
        if told[1:] and told[1][:2] != ("start", came_from):
            sys.exit(f"it went on from {told[1][:2]}, not from {came_from}")
        if part != "start-up" and (at <= self.step or saved <= self.saved):
            sys.exit(f"no further than the kill before, at {self.step}, after which {self.saved} was gone on from")
        self.step, self.saved = max(at, self.step), saved
        return hit

    def _killed(self, part: str, came_from: int, step: int) -> list[tuple[str, int, float]]:
        """Go on with the run and kill it; what was told in that time: what, how many steps were done, and when."""
        (reading, writing), begins = os.pipe(), PARTS[part][0]
        told = [("launch", came_from, time.perf_counter())]
        process = start(self.folder, self.settings, writing)
        os.close(writing)
        watchdog = threading.Timer(HANGS, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.daemon = True
        watchdog.start()
        with os.fdopen(reading) as pipe:
            events = ((what, int(at), time.perf_counter()) for what, at in (line.split(",") for line in pipe))
            while (told[-1][0] != begins or told[-1][1] < step) and (event := next(events, None)):
                told.append(event)
            for (what, _, began), (next_what, _, ended) in itertools.pairwise(told):
                for name, bounds in PARTS.items():
                    self.seconds[name] += [ended - began] if (what, next_what) == bounds else []
            reached = told[-1][0] == begins
            time.sleep(self.rng.random() * statistics.median(self.seconds[part] or [0.0]))
            os.killpg(process.pid, signal.SIGKILL)
            told += events
        watchdog.cancel()
        if process.wait() != -signal.SIGKILL or not reached:
            output = (self.folder / "output.txt").read_text()[-3000:]
            sys.exit(f"the run hung, or ended by itself with status {process.returncode}; its output:\n{output}")
        return told


def whole_files(run: Path) -> int:
    """The step from which a resume will go on.

    Raises:
        SystemExit: a file of the run is broken.
    """
    try:
        saved = {path: checkpoint.read(path)["global_step"] for path in run.glob("checkpoints/*.ckpt")}
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
        for text in [(run / "run.json").read_text("utf-8"), *(line for line in lines if line.endswith("\n"))]:
            json.loads(text)
    except ValueError as error:
        sys.exit(f"a broken file: {error}")
    return saved.get(next(iter(Run(run).checkpoints()), None), 0)


def draw(rng: random.Random, kills: list[int], start_ups: int, steps: int) -> list[tuple[str, int]]:
    """(part, step): so many kills of each part in a random order, each at a step of its own stretch of the run, and
    those of start-ups in between."""
    parts = [part for part, count in zip(PARTS, kills, strict=False) for _ in range(count)]
    if steps < (least := 2 * VAL_EVERY + 3 * SAVE_EVERY * len(parts)):
        sys.exit(f"{steps} steps are too few for {len(parts)} kills: at least {least}")
    rng.shuffle(parts)
    bounds = [1 + i * (steps - 2 * VAL_EVERY) // len(parts) for i in range(len(parts) + 1)]
    plan = [(part, rng.randrange(*stretch)) for part, stretch in zip(parts, itertools.pairwise(bounds), strict=True)]
    for _ in range(start_ups):
        plan.insert(rng.randint(1, len(plan)), ("start-up", 0))
    return plan


def end_of(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for how fast it was."""
    end: dict[str, Any] = {path.name: checkpoint.read(path) for path in run.glob("checkpoints/*.ckpt")}
    for saved in end.values():
        saved["callbacks"].pop("Timer")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of the resumes
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()  # 0: all of them
    tags = set(events.Tags()["scalars"]) - set(SPEED)
    end["tensorboard"] = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    end["metrics.jsonl"] = [line for line in lines if "train/tokens_per_s" not in line]
    end["summary.json"] = {key: value for key, value in summary.items() if key not in SPEED}
    return end


def leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of all that nested dicts and lists hold: tensors as bytes, and numbers with all their digits."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{at}/{key}")
    else:
        yield at, (tree.dtype, tree.shape, tree.numpy().tobytes()) if isinstance(tree, torch.Tensor) else repr(tree)


def differences(ours: Any, theirs: Any) -> list[str]:
    """The places in which two such trees are not bitwise the same."""
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    return sorted(place for place in a.keys() | b.keys() if a.get(place) != b.get(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="for both runs, such as data.workers=2")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--kills", type=int, nargs=3, default=[17, 3, 5], metavar=("TRAINING", "VALIDATION", "WRITE"))
    parser.add_argument("--start-ups", type=int, default=4, help="further kills, of resumes before their first step")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    folder, rng, total = Path(tempfile.mkdtemp(prefix="kill_storm_")), random.Random(options.seed), sum(options.kills)
    print(f"in {folder}, which is kept unless all is well", flush=True)
    settings = [*SETTINGS, f"trainer.max_steps={options.steps}", *options.settings]
    for name in ("peace", "storm"):
        (folder / name).mkdir()
    peace = to_the_end(folder / "peace", settings)
    summary = json.loads((peace / "summary.json").read_text("utf-8"))
    training = summary["steps"] * TOKENS_PER_STEP / summary["tokens_per_s"]
    print(f"untouched: {summary['steps']} steps in {training:.0f} s, ended by {summary['ended']}", flush=True)
    storm, number = Storm(folder / "storm", settings, rng), 0
    for part, step in draw(rng, options.kills, options.start_ups, summary["steps"]):
        number += part != "start-up"
        print("not counted" if part == "start-up" else f"{number} of {total}", end=", ")
        while not storm.strike(part, step):
            print("    again", end=", ")
    if found := differences(end_of(to_the_end(folder / "storm", settings)), end_of(peace)):
        sys.exit(f"{total} kills, and the end differs in {len(found)} places:\n" + "\n".join(found[:50]))
    shutil.rmtree(folder)
    print(f"{total} of {total} kills: no file was ever broken, and the end is bitwise that of the untouched run")


if __name__ == "__main__":
    main()
