"""Benchmarks: python scripts/benchmark.py {train,prepare,startup,guards,busy,sample,memory} [options]

Each part measures its columns once per round, in reversed order every other round, and reports medians and the ratios
within each round. Every measurement starts the programs as a user does; their speed is read from their own logs, by
this process's clock. (`sample` runs in this process, with a thread per core unless OMP_NUM_THREADS says otherwise.)
Results and hardware: scripts/README.md.

To add a part: write a function that returns a `Plan`, and add it to `PARTS`.
"""

import argparse
import contextlib
import filecmp
import functools
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch import nn
from torch.nn import functional as F

Measurement = Callable[[], dict[str, float]]  # column -> value
PATIENCE = 300  # seconds until a program must have done its first steps; torch.compile takes its time
# nanoGPT's two settings for Shakespeare: its README's for a CPU, and config/train_shakespeare_char.py.
SIZES = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0, "block_size": 64, "batch_size": 12},
    "gpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2, "block_size": 256, "batch_size": 64},
}


@dataclass
class Plan:
    """What a part measures, in `unit`, and which ratios of two columns it reports."""

    unit: str
    measurements: list[Measurement]
    ratios: list[tuple[str, str]]


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
        environment={"PYTHONPATH": module_path()} | ({} if spincount == "default" else {"GOMP_SPINCOUNT": spincount}),
    )


def module_path() -> str:
    """With this folder, where a run finds the callback `benchmark.WithoutGuards`."""
    return os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))


def nanogpt(folder: Path, peer: Path, size: dict[str, Any], settings: dict[str, Any], spincount: str) -> Program:
    run = Path(tempfile.mkdtemp(dir=folder))
    settings = {
        **size, "gradient_accumulation_steps": 1, "dataset": str(folder), "out_dir": str(run), "max_iters": 1000000,
        "lr_decay_iters": 1000000, "learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 100,
        "eval_interval": 1000000, "eval_iters": 1, "log_interval": 10, **settings,
    }  # fmt: skip
    return Program(
        [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())],
        cwd=peer,
        output=run / "output.txt",
        log=run / "output.txt",
        step_pattern=r"iter (\d+):",
        tokens_per_step=lambda: size["batch_size"] * size["block_size"],
        environment={"PYTHONWARNINGS": "ignore"} | ({} if spincount == "default" else {"GOMP_SPINCOUNT": spincount}),
    )


def write_nanogpt_data(folder: Path) -> None:
    """The default run's text, Python's documentation, as nanoGPT reads it."""
    from pydoc_data.topics import topics

    import numpy as np

    text = "\n".join(topics.values())
    characters = sorted(set(text))
    ids = np.array([characters.index(char) for char in text], dtype=np.uint16)
    ids[: int(0.9 * len(ids))].tofile(folder / "train.bin")
    ids[int(0.9 * len(ids)) :].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))


def train(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of a training run against nanoGPT's train.py: same model, batch, optimizer and precision."""
    peer, size = options.peer.resolve(), SIZES[options.hardware]
    write_nanogpt_data(folder)
    device = "cuda" if options.hardware == "gpu" else "cpu"
    keys = [f"{'data' if key in ('block_size', 'batch_size') else 'model'}.{key}={size[key]}" for key in size]
    keys = [f"hardware={options.hardware}", *keys, "optim.warmup_steps=100", *options.overrides]
    plan = Plan("tokens/s", [], [])
    for compiled in (False, True) if options.compile else (False,):
        suffix = " compiled" if compiled else ""
        ours = f"gptlab{suffix}"
        run = functools.partial(gptlab, folder, [*keys, f"model.compile={str(compiled).lower()}"])
        plan.measurements.append(speed_of(ours, [run], options))
        for spincount in ("default", "1000") if options.peer_spincount else ("default",):
            theirs = f"nanoGPT{suffix}" + (f", GOMP_SPINCOUNT={spincount}" if spincount != "default" else "")
            settings = {"device": device, "dtype": "bfloat16" if device == "cuda" else "float32", "compile": compiled}
            run = functools.partial(nanogpt, folder, peer, size, settings, spincount)
            plan.measurements.append(speed_of(theirs, [run], options))
            plan.ratios.append((ours, theirs))
    return plan


def speed_of(
    column: str, programs: list[Callable[[], Program]], options: argparse.Namespace, beside_busy_process: bool = False
) -> Measurement:
    """The programs' speeds, all at once, added up."""

    def measure() -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            if beside_busy_process:
                spinning = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                stack.callback(spinning.kill)
            speeds = measure_speeds([program() for program in programs], options.warm_up, options.seconds)
        return {column: sum(speeds)}

    return measure


def guards(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of the default run with and without its guards."""
    on, off = "with guards", "without guards"
    without = ["+callbacks.guards._target_=benchmark.WithoutGuards"]
    measurements = [
        speed_of(on, [lambda: gptlab(folder, options.overrides)], options),
        speed_of(off, [lambda: gptlab(folder, [*without, *options.overrides])], options),
    ]
    return Plan("tokens/s", measurements, [(on, off)])


class WithoutGuards(L.Callback):
    """Replaces the training step by the same one in plain PyTorch: no look at non-finite losses and spikes, no recovery
    from a lack of memory, no seed per step, no handling of signals."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.callbacks = [callback for callback in trainer.callbacks if type(callback).__name__ != "Interrupts"]
        pl_module.training_step = lambda batch, batch_idx: plain_step(pl_module, batch)
        pl_module.on_before_optimizer_step = lambda optimizer: None


def plain_step(module: L.LightningModule, ids: torch.Tensor) -> None:
    """One optimizer step on ids (B, T + 1); logs as often as the guarded one."""
    from gptlab import optim

    config, optimizer = module.optim_config, module.optimizers()
    keys = ("schedule", "lr", "min_lr", "warmup_steps", "decay_steps")
    for group in optimizer.param_groups:
        group["lr"] = optim.learning_rate(module.global_step, **{key: config[key] for key in keys})
    loss = F.cross_entropy(module.model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
    module.manual_backward(loss)
    norm = nn.utils.clip_grad_norm_(module.model.parameters(), config["grad_clip"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if module.global_step % module.trainer.log_every_n_steps == 0:
        metrics = {"train/loss": loss.item(), "train/lr": group["lr"], "train/grad_norm": norm.item()}
        for logger in module.loggers:
            logger.log_metrics(metrics, step=module.global_step)


def busy(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of a run that has the machine to itself, of two runs at once (their sum), and of a run beside a
    process that keeps one core busy; for two model sizes and each value of GOMP_SPINCOUNT."""
    sizes = {"default model": [], "gpt-mini": ["model=gpt-mini", "data.block_size=128"]}
    plan = Plan("tokens/s", [], [])
    for (size, keys), spincount in itertools.product(sizes.items(), options.spincount):
        # Where threads wait for each other, there are few steps to be logged.
        overrides = ["trainer.log_every=2", *keys, *options.overrides]
        run = functools.partial(gptlab, folder, overrides, spincount)
        scenarios = ("alone", "two at once", "beside a busy process")
        alone, two, beside = (f"{size}, spincount {spincount}: {scenario}" for scenario in scenarios)
        plan.measurements += [
            speed_of(alone, [run], options),
            speed_of(two, [run, run], options),
            speed_of(beside, [run], options, beside_busy_process=True),
        ]
        plan.ratios += [(two, alone), (beside, alone)]
    return plan


def startup(options: argparse.Namespace, folder: Path) -> Plan:
    """Seconds from the start of the default run until its first validation and first step are logged, and until a
    config error is reported; beside them, the imports alone."""

    def first_step() -> dict[str, float]:
        run = Path(tempfile.mkdtemp(dir=folder))
        keys = ["trainer.log_every=1", f"hydra.run.dir={run}/run", *options.overrides]
        began = time.perf_counter()
        process = start([sys.executable, "-m", "gptlab.train", *keys], Path.cwd(), run / "output.txt", {})
        try:
            return {
                f"until {what}": wait_for(pattern, run / "run/metrics.jsonl", process) - began
                for what, pattern in (("first validation", '"val/loss"'), ("first step", '"step": 1, "train/l'))
            }
        except TimeoutError:
            sys.exit(f"no first step:\n{tail(run / 'output.txt')}")
        finally:
            kill(process)

    def whole(name: str, command: list[str], status: int) -> Measurement:
        def seconds() -> dict[str, float]:
            began = time.perf_counter()
            process = start([sys.executable, *command], Path.cwd(), folder / "output.txt", {})
            if process.wait() != status:
                sys.exit(f"{name}: exit status {process.returncode}:\n{tail(folder / 'output.txt')}")
            return {name: time.perf_counter() - began}

        return seconds

    imports, error = "import torch, lightning", "config error"
    measurements = [
        first_step,
        whole(error, ["-m", "gptlab.train", "model.n_head=5"], 2),
        whole(imports, ["-c", imports], 0),
    ]
    return Plan("s", measurements, [("until first step", imports), (error, imports)])


def wait_for(pattern: str, log: Path, process: subprocess.Popen) -> float:
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


def prepare(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second and peak memory of scripts/prepare_openwebtext.py against nanoGPT's prepare.py on the same
    documents, one process per core; both must write the same bytes. Beside them, tiktoken alone on documents in memory."""
    documents, cores = options.documents, available_cores()
    if documents is None:
        documents = folder / "documents.jsonl"
        write_documents(documents, options.megabytes * 1_000_000)
    documents = documents.resolve()
    script = Path(__file__).with_name("prepare_openwebtext.py")

    def measure(name: str, command: Callable[[Path], list[str]]) -> Measurement:
        out = folder / name

        def speed() -> dict[str, float]:
            shutil.rmtree(out, ignore_errors=True)
            seconds, memory = time_and_memory(command(out), folder / "output.txt")
            for other, split in itertools.product(folder.glob("*/train.bin"), ("train.bin", "val.bin")):
                if not filecmp.cmp(out / split, other.with_name(split), shallow=False):
                    sys.exit(f"{out / split} differs from {other.with_name(split)}")
            for cache in out.glob("json"):  # of `datasets`: a next run must not profit from it
                shutil.rmtree(cache)
            tokens = sum((out / split).stat().st_size // 2 for split in ("train.bin", "val.bin"))
            return {name: tokens / seconds, f"{name}, peak MB": memory / 1e6}

        return speed

    measurements = [
        measure("gptlab", lambda out: [sys.executable, str(script), f"path={documents}", f"out={out}", f"processes={cores}"]),
        measure("nanoGPT", lambda out: nanogpt_prepare(options.peer, documents, out, cores)),
        lambda: {"tiktoken alone": tiktoken_speed(documents, cores)},
    ]  # fmt: skip
    return Plan("tokens/s", measurements, [("gptlab", "nanoGPT"), ("gptlab", "tiktoken alone")])


def nanogpt_prepare(peer: Path, documents: Path, out: Path, cores: int) -> list[str]:
    """The command that runs nanoGPT's script as it is but for three places: it reads the documents from the file, its 8
    processes become one per core, and its 1,024 batches no more than there are documents."""
    source = (peer / "data/openwebtext/prepare.py").read_text("utf-8")
    changes = {
        'load_dataset("openwebtext", num_proc=num_proc_load_dataset)': f'load_dataset("json", data_files={str(documents)!r}, cache_dir={str(out)!r})',
        "num_proc = 8": f"num_proc = {cores}",
        "total_batches = 1024": "total_batches = min(1024, len(dset))",
    }
    for old, new in changes.items():
        if source.count(old) != 1:
            sys.exit(f"{peer}: unknown version of nanoGPT; its prepare.py lacks {old!r}")
        source = source.replace(old, new)
    out.mkdir()
    (out / "prepare.py").write_text(source, "utf-8")
    return [sys.executable, str(out / "prepare.py")]


def write_documents(path: Path, size: int) -> None:
    """About `size` bytes of JSON lines: the sources of Python's standard library, again and again."""
    library = Path(os.__file__).parent
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    texts = [text for file in files if (text := file.read_text("utf-8", errors="replace"))]
    with open(path, "w", encoding="utf-8") as out:
        for text in itertools.cycle(texts):
            if out.tell() >= size:
                break
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def time_and_memory(command: list[str], output: Path) -> tuple[float, int]:
    """Seconds, and the most memory in bytes of all its processes together (PSS)."""
    began, most = time.perf_counter(), 0
    process = start(command, Path.cwd(), output, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    try:
        while process.poll() is None:
            most = max(most, memory_of_session(process.pid))
            time.sleep(0.2)
    finally:
        kill(process)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail(output)}")
    return time.perf_counter() - began, most


def memory_of_session(session: int) -> int:
    """Proportional share of memory (PSS, Linux) of its processes, in bytes."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(int(folder.name)) == session:
                shares = re.findall(r"^Pss: +(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)
                total += 1024 * sum(map(int, shares))
    return total


def tiktoken_speed(documents: Path, cores: int) -> float:
    """The ceiling: up to 40 MB of documents per core in memory, encoded by tiktoken alone."""
    with open(documents, encoding="utf-8") as file:
        lines = file.readlines(40_000_000 * cores)
    shares = [[json.loads(line)["text"] for line in lines[i::cores]] for i in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(encode, shares, chunksize=1))


def encode(texts: list[str]) -> float:
    """Tokens per second of one process."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    began = time.perf_counter()
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    return tokens / (time.perf_counter() - began)


def sample(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of generated text against Hugging Face's `generate` and nanoGPT's: same random weights, same
    sampler, a prompt of one token, then 250 (baby) or 100 (124M) new ones per row and no stop. Beside them, what the
    machine's memory can do."""
    import benchmark_sample

    device = "cuda" if options.hardware == "gpu" else "cpu"
    return Plan(
        "tokens/s", *benchmark_sample.columns(options.size, options.batch, options.peer, options.profile, device)
    )


def memory(options: argparse.Namespace, folder: Path) -> Plan:
    """Peak memory and seconds of a training step of GPT-2 124M, block 1024, against nanoGPT's: micro-batch 4 in fp32 on a
    CPU, 12 in bf16 on a GPU."""
    import benchmark_memory

    device = "cuda" if options.hardware == "gpu" else "cpu"
    return Plan("peak GB; s per step", *benchmark_memory.columns(options.peer.resolve(), device, options.compile))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_in_use() -> float | None:
    """How many cores the machine's processes keep busy, over one second; None without /proc/stat."""

    def busy_seconds() -> float:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    try:
        before = busy_seconds()
    except OSError:
        return None
    time.sleep(1)
    return busy_seconds() - before


def describe_machine() -> dict[str, Any]:
    cpu = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    gpus = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {"cpu": cpu, "cores": available_cores(), "gpus": gpus, "os": platform.platform(),
            "python": platform.python_version(), "torch": version("torch")}  # fmt: skip


def describe_git() -> dict[str, Any]:
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": output_of("git", "rev-parse", "HEAD"), "dirty": changes != ""}


def output_of(*command: str) -> str | None:
    """None if it fails, or is not installed."""
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def summarize(rounds: list[dict[str, float]], ratios: list[tuple[str, str]]) -> dict[str, list[float]]:
    """The values of each column and ratio, by round."""
    values = {column: [values[column] for values in rounds] for column in rounds[0]}
    for a, b in ratios:
        values[f"{a} / {b}"] = [values[a] / values[b] if values[b] else float("nan") for values in rounds]
    return values


def format_table(values: dict[str, list[float]], unit: str) -> str:
    def show(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"

    width = max(map(len, values))
    lines = [f"{unit:<{width}} {'median':>12} {'lowest':>12} {'highest':>12}"]
    for name, row in values.items():
        lines.append(f"{name:<{width}} " + " ".join(f"{show(f(row)):>12}" for f in (statistics.median, min, max)))
    return "\n".join(lines)


PARTS = {part.__name__: part for part in (train, prepare, startup, guards, busy, sample, memory)}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("overrides", nargs="*", help="for gptlab's runs, such as model=gpt-mini")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--seconds", type=float, default=15, help="of training that a measurement takes")
    parser.add_argument("--warm-up", type=int, default=50, help="steps before that")
    parser.add_argument(
        "--peer", type=Path, help="train, prepare, sample, memory: a clone of https://github.com/karpathy/nanoGPT"
    )
    parser.add_argument("--hardware", choices=SIZES, default="cpu", help="train: also chooses the size of the model")
    parser.add_argument("--compile", action="store_true", help="train, memory: also with torch.compile, on both sides")
    parser.add_argument("--peer-spincount", action="store_true", help="train: also nanoGPT with GOMP_SPINCOUNT=1000")
    parser.add_argument("--spincount", nargs="+", default=["default"], help="busy: of GOMP_SPINCOUNT")
    parser.add_argument("--documents", type=Path, help="prepare: JSON lines with a text each (default: written here)")
    parser.add_argument("--megabytes", type=int, default=500, help="prepare: of those written here")
    parser.add_argument("--size", nargs="+", choices=("baby", "124M"), default=["baby", "124M"], help="sample: models")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sample: rows generated at once")
    parser.add_argument("--profile", action="store_true", help="sample: also where gptlab's time goes")
    options = parser.parse_intermixed_args(argv)
    if options.part in ("train", "prepare", "memory") and options.peer is None:
        parser.error(f"{options.part} needs --peer PATH_OF_NANOGPT")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    report: dict[str, Any] = {"command": sys.argv, "machine": describe_machine(), "git": describe_git()}
    report["cores_in_use_before"] = in_use = cores_in_use()
    print(json.dumps(report, indent=2), flush=True)
    if in_use and in_use > 0.1:
        print(f"warning: other processes keep {in_use:.1f} cores busy; do not publish these figures", flush=True)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        plan = PARTS[options.part](options, Path(folder).resolve())
        for number in range(options.rounds):
            in_order = plan.measurements[:: -1 if number % 2 else 1]
            rounds.append({name: value for measure in in_order for name, value in measure().items()})
            values = summarize(rounds, plan.ratios)
            print(f"\nround {number + 1} of {options.rounds}\n{format_table(values, plan.unit)}", flush=True)
            if options.json:  # after each round: a benchmark that is cut short leaves what it has
                report |= {"part": options.part, "unit": plan.unit, "values": values}
                options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
