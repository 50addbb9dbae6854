"""What the parts of benchmark.py share: a plan of measurements, and the programs that are measured."""

import contextlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Measurement = Callable[[], dict[str, float]]  # column -> value
PATIENCE = 300  # seconds until a program must have done its first steps; torch.compile takes its time
# nanoGPT's settings for Shakespeare: its README's for a CPU, and config/train_shakespeare_char.py, also with 8 sequences.
SIZES = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "block_size": 64, "batch_size": 12},
    "baby": {"n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "block_size": 256, "batch_size": 8},
    "gpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "block_size": 256, "batch_size": 64},
}


@dataclass
class Plan:
    """What a part measures, in `unit`, which ratios of two columns it reports, and what its reader should know."""

    unit: str
    measurements: list[Measurement] = field(default_factory=list)
    ratios: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Program:
    """A training program that logs its steps into a file; a context manager in which it runs."""

    command: list[str]
    cwd: Path
    output: Path
    log: Path
    step_pattern: str
    tokens_per_step: Callable[[], int]
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Program":
        self.steps: list[tuple[float, int]] = []  # (seconds, step) of each logged step
        self._unread = None
        self.process = start(self.command, self.cwd, self.output, self.environment)
        return self

    def __exit__(self, *_: Any) -> None:
        kill(self.process)
        if self._unread:
            self._unread.close()

    def poll(self) -> None:
        """Read what was logged since the last call.

        Raises:
            SystemExit: the program has ended.
        """
        if self.process.poll() is not None:
            sys.exit(f"{' '.join(self.command)}\nended with status {self.process.returncode}:\n{tail(self.output)}")
        if self._unread is None and self.log.exists():
            self._unread = open(self.log)  # noqa: SIM115  (closed on exit)
        if self._unread and (found := re.findall(self.step_pattern, self._unread.read())):
            self.steps.append((time.perf_counter(), int(found[-1])))

    def tokens_per_s(self) -> float:
        """0 if fewer than two steps were logged."""
        if len(self.steps) < 2:
            return 0.0
        (began, first), (ended, last) = self.steps[0], self.steps[-1]
        return (last - first) * self.tokens_per_step() / (ended - began)


def start(command: list[str], cwd: Path, output: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start in a process group of its own, without the shell's settings for OpenMP."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    with open(output, "wb") as file:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=inherited | {"PYTHONUNBUFFERED": "1"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(output: Path) -> str:
    return output.read_text("utf-8", errors="replace")[-3000:]


def time_of(command: list[str], cwd: Path, output: Path, environment: dict[str, str], status: int = 0) -> float:
    """Seconds from the start of a process to its end.

    Raises:
        SystemExit: it ended with another exit status.
    """
    began = time.perf_counter()
    process = start(command, cwd, output, environment)
    try:
        ended = process.wait()
        seconds = time.perf_counter() - began
    finally:
        kill(process)
    if ended != status:
        sys.exit(f"{' '.join(command)}\nended with status {ended}:\n{tail(output)}")
    return seconds


def measure_speeds(programs: list[Program], warm_up: int, seconds: float) -> list[float]:
    """Tokens per second of each program, all running at once, over `seconds` (longer if a program has not logged two
    steps by then) after each has done `warm_up` steps."""

    def poll_until(done: Callable[[], bool], seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        while not done() and time.perf_counter() < deadline:
            for program in programs:
                program.poll()
            time.sleep(0.01)

    with contextlib.ExitStack() as stack:
        for program in programs:
            stack.enter_context(program)
        poll_until(lambda: all(program.steps and program.steps[-1][1] >= warm_up for program in programs), PATIENCE)
        for program in programs:
            program.steps.clear()
        poll_until(lambda: False, seconds)
        poll_until(lambda: all(len(program.steps) >= 2 for program in programs), PATIENCE)
        return [program.tokens_per_s() for program in programs]


def openmp(spincount: str) -> dict[str, str]:
    return {} if spincount == "default" else {"GOMP_SPINCOUNT": spincount}


def gptlab(folder: Path, overrides: Iterable[str], spincount: str = "default") -> Program:
    """A run that trains until it is killed; one line of metrics every 10 steps, nothing else after step 0."""
    run = Path(tempfile.mkdtemp(dir=folder))
    keys = ["trainer.max_steps=1000000", "trainer.val_every=1000000", "data.val_windows=1", f"hydra.run.dir={run}/run"]

    def tokens_per_step() -> int:
        data = yaml.safe_load((run / "run/config.yaml").read_text("utf-8"))["data"]
        return data["batch_size"] * data["block_size"]

    return Program(
        [sys.executable, "-m", "gptlab.train", *keys, *overrides],
        cwd=Path.cwd(),
        output=run / "output.txt",
        log=run / "run/metrics.jsonl",
        step_pattern=r'"step": (\d+), "train/l',  # loss or lr: the line is written once the loss is known
        tokens_per_step=tokens_per_step,
        environment={"PYTHONPATH": module_path()} | openmp(spincount),
    )


def module_path() -> str:
    """With this folder, where a run finds the callback `benchmark_train.WithoutGuards`."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


def nanogpt(folder: Path, peer: Path, size: dict[str, Any], settings: dict[str, Any], spincount: str) -> Program:
    """nanoGPT's train.py on the data in `folder`; `settings` are its own."""
    run = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        **size, "gradient_accumulation_steps": 1, "dataset": str(folder), "out_dir": str(run), "max_iters": 1000000,
        "lr_decay_iters": 1000000, "learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100,
        "eval_interval": 1000000, "eval_iters": 1, "log_interval": 10, **settings,
    }  # fmt: skip
    return Program(
        [sys.executable, "train.py", *as_flags(settings)],
        cwd=peer,
        output=run / "output.txt",
        log=run / "output.txt",
        step_pattern=r"iter (\d+):",
        tokens_per_step=lambda: size["batch_size"] * size["block_size"],
        environment={"PYTHONWARNINGS": "ignore"} | openmp(spincount),
    )


def as_flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def library(name: str, folder: Path, size: dict[str, Any], device: str, peer: Path | None, spincount: str) -> Program:
    """A peer that is a library, on the data in `folder`: its Trainer, in benchmark_peers.py."""
    run = Path(tempfile.mkdtemp(dir=folder))
    settings = size | {"folder": str(folder), "device": device, "path": str(peer)}
    return Program(
        [sys.executable, str(Path(__file__).with_name("benchmark_peers.py")), name, json.dumps(settings)],
        cwd=run,
        output=run / "output.txt",
        log=run / "output.txt",
        step_pattern=r"step (\d+):",
        tokens_per_step=lambda: size["batch_size"] * size["block_size"],
        environment={"PYTHONWARNINGS": "ignore"} | openmp(spincount),
    )


def write_nanogpt_data(folder: Path, text: str) -> int:
    """The text as nanoGPT's prepare.py writes it: train.bin, val.bin and meta.pkl; returns the size of its vocabulary."""
    import numpy as np

    characters = sorted(set(text))
    stoi = {char: i for i, char in enumerate(characters)}
    ids = np.array([stoi[char] for char in text], dtype=np.uint16)
    ids[: int(0.9 * len(ids))].tofile(folder / "train.bin")
    ids[int(0.9 * len(ids)) :].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return len(characters)
