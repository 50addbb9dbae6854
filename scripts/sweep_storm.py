"""SIGKILL a sweep at random, resume it each time, and compare all of it bitwise with an uninterrupted one.

    python scripts/sweep_storm.py            4 configurations x 3 seeds, two jobs at a time
    python scripts/sweep_storm.py optuna     12 trials of a study, one at a time

Only the process of the sweep is killed. Its jobs notice, save and end by themselves, and the resume continues them from
where they were: at least three of the kills must hit jobs in the middle of their training, or the sweep is killed again.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gptlab.run import read_metrics

STEPS, JOBS = 250, 12
RUN = ["model=gpt-nano", "hardware=cpu", f"trainer.max_steps={STEPS}", "trainer.val_every=50", "trainer.checkpoint_every=25",
       "model.dropout=0.1", "data.micro_batch_size=5", "data.val_windows=64", "trainer.log_every=5"]  # fmt: skip
SWEEPS = {
    "grid": ["-m", "optim.lr=1e-3,3e-3", "optim.weight_decay=0,0.1", "seed=1,2,3", "n_jobs=2"],
    "optuna": [
        "sweep=optuna",
        "optim.lr=tag(log,interval(1e-4,1e-2))",
        "model.dropout=interval(0,0.3)",
        f"n_trials={JOBS}",
    ],
}
SPEED = ("train/tokens_per_s", "train/data_wait", "tokens_per_s", "seconds")  # differ between any two runs
KILLS, LEAST_RESUMES = 3, 3


def start(folder: Path, sweep: str) -> subprocess.Popen:
    """Start the sweep in `folder`, or resume it."""
    index = folder / "sweep.json"
    arguments = [f"resume={folder}"] if index.exists() else [*SWEEPS[sweep], *RUN, f"hydra.sweep.dir={folder}"]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, "-m", "gptlab.train", *arguments], stdout=log, stderr=log)


def steps_done(folder: Path) -> int:
    """Of all jobs together, as far as they are logged."""
    return sum(entries[-1]["step"] for path in folder.glob("*/metrics.jsonl") if (entries := read_metrics(path)))


def resumes(folder: Path) -> int:
    """How often a job was resumed from the middle of its training."""
    resumed = [json.loads(path.read_text()).get("resumed", []) for path in folder.glob("*/run.json")]
    return sum(0 < one["step"] < STEPS for several in resumed for one in several)


def kill_at_random(folder: Path, sweep: str, seed: int) -> int:
    """Run the sweep to its end, with kills on the way; returns how many."""
    chance, kills = random.Random(seed), 0
    while True:
        process, begun = start(folder, sweep), steps_done(folder)
        left = JOBS * STEPS - begun
        target = begun + chance.uniform(0.05, 0.9 / max(1, KILLS - kills)) * left
        enough = kills >= KILLS and resumes(folder) >= LEAST_RESUMES
        while process.poll() is None and (enough or steps_done(folder) < target):
            time.sleep(0.05)
        if process.poll() is not None:
            assert process.returncode == 0, f"status {process.returncode}; see {folder.with_suffix('.log')}"
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        print(f"kill {kills} at {steps_done(folder)} of {JOBS * STEPS} steps", flush=True)


def contents(folder: Path) -> dict[str, Any]:
    """The rows of results.csv and the metrics of every job, without speeds."""
    rows = list(csv.DictReader((folder / "results.csv").open()))
    metrics = {path.parent.name: read_metrics(path) for path in sorted(folder.glob("*/metrics.jsonl"))}
    entries = [(f"results.csv, job {row['folder']}", [row]) for row in rows] + list(metrics.items())
    return {
        name: [
            line for entry in lines if (line := {k: v for k, v in entry.items() if k not in SPEED}).keys() - {"step"}
        ]
        for name, lines in entries
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="?", choices=SWEEPS, default="grid")
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gptlab_sweep_storm")
    options = parser.parse_args()
    options.folder = options.folder.resolve() / time.strftime("%Y-%m-%d_%H-%M-%S")
    options.folder.mkdir(parents=True)
    whole, killed = options.folder / "whole", options.folder / "killed"
    assert start(whole, options.sweep).wait() == 0, f"the uninterrupted sweep failed; see {whole}.log"
    kills = kill_at_random(killed, options.sweep, options.seed)
    expected, got = contents(whole), contents(killed)
    assert len(expected) == 2 * JOBS, f"{len(expected)} tables instead of {2 * JOBS}"
    different = [name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)]
    print(
        f"{kills} kills, {resumes(killed)} resumes in the middle of a run; {len(different)} of {len(expected)} tables differ"
    )
    sys.exit(f"different: {', '.join(sorted(different))}; see {options.folder}" if different else 0)


if __name__ == "__main__":
    main()
