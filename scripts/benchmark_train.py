"""The parts `train`, `busy`, `guards` and `step` of benchmark.py: tokens per second of training, and where its time goes."""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_ceiling
import benchmark_programs as programs
import lightning as L
import torch
from benchmark_programs import SIZES, Measurement, Plan, Program

from gptlab import linear
from gptlab.data.files import python_docs

Start = Callable[[], Program]


def train(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of a training run against nanoGPT's train.py, minGPT's Trainer and Hugging Face's: same model,
    batch, optimizer, text and OpenMP settings. Beside them the ceiling: what they would reach if every operation that is
    counted ran as fast as the fastest matrix product."""
    vocab_size = programs.write_nanogpt_data(folder, python_docs())
    plan = Plan("tokens/s", notes=missing_peers(options))
    _, precision = device_and_precision(options)
    # Where the CPU multiplies bf16, also what `trainer.precision=auto` chooses there.
    precisions = dict.fromkeys((precision, "bf16") if linear.fast_bf16() else (precision,))
    flops = {size: benchmark_ceiling.flops_per_token(vocab_size, SIZES[size]) for size in options.size}
    plan.measurements += [ceiling(precision, flops, options, folder) for precision in precisions]
    for size in options.size:
        ours = {}
        for precision, compiled in itertools.product(precisions, compilations(options)):
            column = f"{size}: gptlab {precision}" + " compiled" * compiled
            ours[column] = gptlab(size, options, folder, precision, [f"model.compile={str(compiled).lower()}"])
            plan.ratios.append((column, f"{size}: ceiling {precision}"))
        theirs = peers(size, options, folder)
        plan.measurements += [speed_of(column, [start], options) for column, start in (ours | theirs).items()]
        plan.ratios += itertools.product(ours, theirs)
    return plan


def device_and_precision(options: argparse.Namespace) -> tuple[str, str]:
    """Those in which nanoGPT trains."""
    return ("cuda", "bf16") if options.hardware == "gpu" else ("cpu", "fp32")


def compilations(options: argparse.Namespace) -> tuple[bool, ...]:
    return (False, True) if options.compile else (False,)


def gptlab(size: str, options: argparse.Namespace, folder: Path, precision: str, overrides: list[str]) -> Start:
    keys = [f"{'data' if key in ('block_size', 'batch_size') else 'model'}.{key}={n}" for key, n in SIZES[size].items()]
    keys += [f"hardware={options.hardware}", f"trainer.precision={precision.removeprefix('fp')}"]
    keys += ["optim.warmup_steps=100", *overrides, *options.overrides]
    return lambda: programs.gptlab(folder, keys, options.spincount)


def nanogpt(
    size: str, options: argparse.Namespace, folder: Path, spincount: str, compiled: bool = False, log_every: int = 10
) -> Start:
    device, precision = device_and_precision(options)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    settings = {"device": device, "dtype": dtype, "compile": compiled, "log_interval": log_every}
    return lambda: programs.nanogpt(folder, options.peer.resolve(), SIZES[size], settings, spincount)


def peers(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Start]:
    """Column -> program, of the peers that are present."""
    found: dict[str, Start] = {}
    device, precision = device_and_precision(options)
    for compiled in compilations(options) if options.peer else ():
        column = f"{size}: nanoGPT {precision}" + " compiled" * compiled
        found[column] = nanogpt(size, options, folder, options.spincount, compiled)

    def library(name: str, peer: Path | None = None) -> Start:
        return lambda: programs.library(name, folder, SIZES[size], device, peer, options.spincount)

    if options.mingpt:
        found[f"{size}: minGPT fp32"] = library("mingpt", options.mingpt.resolve())  # it has no other precision
    if lacks_trainer() is None:
        found[f"{size}: Hugging Face {precision}"] = library("hugging_face")
    return found


def missing_peers(options: argparse.Namespace) -> list[str]:
    missing = [] if options.peer else ["no column for nanoGPT: give its folder with --peer"]
    missing += [] if options.mingpt else ["no column for minGPT: give its folder with --mingpt"]
    return missing + [f"no column for Hugging Face's Trainer: {why}" for why in [lacks_trainer()] if why]


def lacks_trainer() -> str | None:
    """Why Hugging Face's Trainer cannot run here; None if it can."""
    if importlib.util.find_spec("transformers") is None:
        return "pip install transformers accelerate"
    from transformers.utils import is_accelerate_available

    return None if is_accelerate_available() else "it needs accelerate: pip install accelerate"


def ceiling(precision: str, flops: dict[str, float], options: argparse.Namespace, folder: Path) -> Measurement:
    """The fastest matrix product, measured in a process of its own with the threads that training has; and what it means
    in tokens per second. `flops`: per token, of each size."""
    device, _ = device_and_precision(options)
    command = [sys.executable, benchmark_ceiling.__file__, precision, device]

    def measure() -> dict[str, float]:
        programs.time_of(command, Path.cwd(), folder / "output.txt", programs.openmp(options.spincount))
        peak = float((folder / "output.txt").read_text().split()[-1])
        values = {f"matrix product {precision}, GFLOP/s": peak / 1e9}
        for size, per_token in flops.items():
            values |= {f"{size}: MFLOP per token": per_token / 1e6, f"{size}: ceiling {precision}": peak / per_token}
        return values

    return measure


def speed_of(
    column: str, starts: list[Start], options: argparse.Namespace, beside_busy_process: bool = False
) -> Measurement:
    """The programs' speeds, all at once, added up."""

    def measure() -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            if beside_busy_process:
                spinning = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(spinning.kill)
            speeds = programs.measure_speeds([start() for start in starts], options.warm_up, options.seconds)
        return {column: sum(speeds)}

    return measure


def busy(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of a run that has the machine to itself, of two runs at once (their sum), and of a run beside a
    process that keeps one core busy. Two runs of nanoGPT at once, as it comes and with gptlab's GOMP_SPINCOUNT."""
    programs.write_nanogpt_data(folder, python_docs())
    _, precision = device_and_precision(options)
    plan = Plan("tokens/s", notes=[] if options.peer else ["no columns for nanoGPT: give its folder with --peer"])
    for size in options.size:
        # Where threads wait for each other, there are few steps to be logged.
        run = gptlab(size, options, folder, precision, ["trainer.log_every=2"])
        scenarios = ("alone", "two at once", "beside a busy process")
        alone, two, beside = (f"{size}: gptlab {scenario}" for scenario in scenarios)
        plan.measurements += [
            speed_of(alone, [run], options),
            speed_of(two, [run, run], options),
            speed_of(beside, [run], options, beside_busy_process=True),
        ]
        plan.ratios += [(two, alone), (beside, alone)]
        for spincount in dict.fromkeys(("default", options.spincount)) if options.peer else ():
            how = "as it comes" if spincount == "default" else f"GOMP_SPINCOUNT={spincount}"
            theirs = f"{size}: nanoGPT two at once, {how}"
            run = nanogpt(size, options, folder, spincount, log_every=2)
            plan.measurements.append(speed_of(theirs, [run, run], options))
            plan.ratios.append((two, theirs))
    return plan


def guards(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of the default run with and without its guards."""
    on, off = "with guards", "without guards"
    without = ["+callbacks.guards._target_=benchmark_train.WithoutGuards"]
    measurements = [
        speed_of(on, [lambda: programs.gptlab(folder, options.overrides)], options),
        speed_of(off, [lambda: programs.gptlab(folder, [*without, *options.overrides])], options),
    ]
    return Plan("tokens/s", measurements, [(on, off)])


def step(options: argparse.Namespace, folder: Path) -> Plan:
    """Milliseconds of each part of gptlab's training step on a CPU, by the clock of the training process. Started
    in the folder of another version, those of that one."""
    _, precision = device_and_precision(options)
    measurements = []
    for size in options.size:
        file = folder / f"{size}.json"
        settings = {"_target_": "benchmark_train.StepParts", "file": file} | {
            key: getattr(options, key) for key in ("warm_up", "seconds")
        }
        keys = [f"+callbacks.parts.{key}={value}" for key, value in settings.items()]
        start = gptlab(size, options, folder, precision, keys)
        measurements.append(functools.partial(parts_of_step, size, start, file))
    return Plan("ms", measurements)


def parts_of_step(size: str, start: Start, file: Path) -> dict[str, float]:
    with start() as program:
        if program.process.wait():
            sys.exit(f"{size}: ended with status {program.process.returncode}:\n{programs.tail(program.output)}")
    return {f"{size}: {part}": value for part, value in json.loads(file.read_text()).items()}


class StepParts(L.Callback):
    """Ends the run `seconds` after `warm_up` steps, with the median milliseconds of each part of a step in `file`."""

    def __init__(self, file: str, warm_up: int, seconds: float) -> None:
        self.file, self.warm_up, self.seconds = Path(file), warm_up, seconds
        self.steps: list[dict[str, float]] = []  # of each step, the seconds of its parts
        self.parts: Counter[str] = Counter()
        self.began = time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        methods = ("nats", "manual_backward", "clip_gradients", "training_step")
        for owner, name in [*((pl_module, name) for name in methods), (trainer.strategy, "optimizer_step")]:
            setattr(owner, name, self.timed(name, getattr(owner, name)))

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - began

        return wrapped

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        now, p = time.perf_counter(), self.parts
        self.steps.append({
            "whole step": now - self.began,
            "forward and loss": p["nats"],
            "backward": p["manual_backward"],
            "gradient norm and clipping": p["clip_gradients"],
            "optimizer": p["optimizer_step"] - p["clip_gradients"],  # which Lightning calls within it
            "learning rate, seed, logging": p["training_step"] - p["nats"] - p["manual_backward"] - p["optimizer_step"],
            "batch, loop and callbacks": now - self.began - p["training_step"],
        })  # fmt: skip
        self.began = now
        p.clear()
        measured = self.steps[self.warm_up :]
        if sum(step["whole step"] for step in measured) >= self.seconds:
            medians = {part: 1000 * statistics.median(step[part] for step in measured) for part in measured[0]}
            self.file.write_text(json.dumps(medians), "utf-8")
            trainer.should_stop = True


class WithoutGuards(L.Callback):
    """Replaces the training step by the same one in plain PyTorch: no look at non-finite losses and spikes, no recovery
    from a lack of memory, no seed per step, no handling of signals."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.callbacks = [callback for callback in trainer.callbacks if type(callback).__name__ != "Interrupts"]
        pl_module.training_step = lambda batch, batch_idx: plain_step(pl_module, batch)
        pl_module.on_before_optimizer_step = lambda optimizer: None


def plain_step(module: L.LightningModule, ids: torch.Tensor) -> None:
    """One optimizer step on ids (B, T + 1); logs as often as the guarded one."""
    optimizer, lr = module.optimizers(), module._learning_rate(module.global_step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    loss = module.nats(ids, None) / ids[:, 1:].numel()
    module.manual_backward(loss)
    norm = module.clip_gradients(module.optim_config["grad_clip"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if module.global_step % module.trainer.log_every_n_steps == 0:
        metrics = {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": norm.item()}
        for logger in module.loggers:
            logger.log_metrics(metrics, step=module.global_step)
