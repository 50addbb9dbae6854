"""The parts `startup` and `time_to_loss` of benchmark.py: seconds of whole programs."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark_programs as programs
from benchmark_programs import PATIENCE, SIZES, Measurement, Plan

# nanoGPT's README, "I only have a macbook".
RECIPE = SIZES["cpu"] | {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "max_iters": 2000, "lr_decay_iters": 2000,
}  # fmt: skip
# Experiments: the loss that each is made to reach, in what share of nanoGPT's time.
TARGETS = {
    "shakespeare_char_speedrun": "1.88 in 1/12",
    "shakespeare_char_speedrun_plain": "1.88 in 1/8",
    "shakespeare_char_speedrun_160": "1.60 in 1/2",
    "shakespeare_char_speedrun_154": "1.54 in 1/1",
}


def time_to_loss(options: argparse.Namespace, folder: Path) -> Plan:
    """Seconds from the start of a program to its end, and the loss of its last step on the whole validation split of Tiny
    Shakespeare: nanoGPT's CPU recipe, and gptlab's experiments. Start-up and validations count. A round is a seed of
    gptlab's, while nanoGPT's is fixed."""
    text = options.shakespeare.resolve()
    programs.write_nanogpt_data(folder, text.read_text("utf-8"))
    plan = Plan("s", [nanogpt_recipe(options, folder, text)])
    for experiment in options.experiment:
        plan.measurements.append(gptlab_experiment(experiment, iter(options.seeds), options, folder, text))
        plan.ratios.append(("nanoGPT", experiment))
    plan.notes = [f"seeds of gptlab's, one a round: {', '.join(map(str, options.seeds))}; nanoGPT's is 1337"]
    return plan


def nanogpt_recipe(options: argparse.Namespace, folder: Path, text: Path) -> Measurement:
    settings = RECIPE | {"dataset": folder, "out_dir": folder / "nanogpt"}
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *programs.as_flags(settings)]

    def measure() -> dict[str, float]:
        seconds = programs.time_of(
            command, options.peer.resolve(), folder / "output.txt", programs.openmp(options.spincount)
        )
        return {"nanoGPT": seconds, "nanoGPT, loss": evaluate(folder, text)}

    return measure


def evaluate(folder: Path, text: Path) -> float:
    """Nats per token of nanoGPT's checkpoint on the whole validation split, in windows of its context."""
    out = folder / "evaluated.json"
    out.unlink(missing_ok=True)
    keys = {
        "ckpt": folder / "nanogpt/ckpt.pt", "meta": folder / "meta.pkl", "data": "shakespeare_char", "data.path": text,
        "data.block_size": RECIPE["block_size"], "out": out,
    }  # fmt: skip
    command = [sys.executable, "-m", "gptlab.evaluate", *(f"{key}={value}" for key, value in keys.items())]
    programs.time_of(command, Path.cwd(), folder / "output.txt", {})
    return json.loads(out.read_text())["loss"]


def gptlab_experiment(
    experiment: str, seeds: Iterator[int], options: argparse.Namespace, folder: Path, text: Path
) -> Measurement:
    target = TARGETS.get(experiment)
    loss = f"{experiment}, loss" + (f" (target {target})" if target else "")

    def measure() -> dict[str, float]:
        run = Path(tempfile.mkdtemp(dir=folder)) / "run"
        keys = [f"experiment={experiment}", f"data.path={text}", f"seed={next(seeds)}", f"hydra.run.dir={run}"]
        keys += [f"hardware={options.hardware}", *options.overrides]
        command = [sys.executable, "-m", "gptlab.train", *keys]
        seconds = programs.time_of(command, Path.cwd(), folder / "output.txt", programs.openmp(options.spincount))
        return {experiment: seconds, loss: json.loads((run / "summary.json").read_text())["last"]["val/loss"]}

    return measure


def startup(options: argparse.Namespace, folder: Path) -> Plan:
    """Seconds from the start of the default run until its first validation and first step are logged, and until a
    config error is reported; beside them, the imports alone."""

    def first_step() -> dict[str, float]:
        run = Path(tempfile.mkdtemp(dir=folder))
        keys = ["trainer.log_every=1", f"hydra.run.dir={run}/run", *options.overrides]
        began = time.perf_counter()
        process = programs.start([sys.executable, "-m", "gptlab.train", *keys], Path.cwd(), run / "output.txt", {})
        try:
            return {
                f"until {what}": wait_for(pattern, run / "run/metrics.jsonl", process) - began
                for what, pattern in (("first validation", '"val/loss"'), ("first step", '"step": 1, "train/l'))
            }
        except TimeoutError:
            sys.exit(f"no first step:\n{programs.tail(run / 'output.txt')}")
        finally:
            programs.kill(process)

    def whole(name: str, command: list[str], status: int) -> Measurement:
        command = [sys.executable, *command]
        return lambda: {name: programs.time_of(command, Path.cwd(), folder / "output.txt", {}, status)}

    imports, error = "import torch, lightning", "config error"
    measurements = [
        first_step,
        whole(error, ["-m", "gptlab.train", "model.n_head=5"], 2),
        whole(imports, ["-c", imports], 0),
    ]
    return Plan("s", measurements, [("until first step", imports), (error, imports)])


def wait_for(pattern: str, log: Path, process: Any) -> float:
    """The time at which the log contains the pattern.

    Raises:
        TimeoutError: the process ended without it, or it took too long.
    """
    deadline = time.perf_counter() + PATIENCE
    while process.poll() is None and time.perf_counter() < deadline:
        if log.exists() and pattern in log.read_text("utf-8"):
            return time.perf_counter()
        time.sleep(0.005)
    raise TimeoutError
