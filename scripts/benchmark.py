"""Benchmarks: python scripts/benchmark.py {train,time_to_loss,prepare,startup,guards,busy,step,sample,memory} [options]

Each part measures its columns once per round, in reversed order every other round, and reports medians and the ratios
within each round. Every measurement starts the programs as a user does; their speed is read from their own logs, by
this process's clock. (`sample` runs in this process, with a thread per core unless OMP_NUM_THREADS says otherwise.)
Results and hardware: scripts/README.md.

To add a part: write a function that returns a `Plan`, and add it to `PARTS`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import benchmark_sample
from benchmark_prepare import prepare
from benchmark_programs import SIZES, Plan
from benchmark_time import TARGETS, startup, time_to_loss
from benchmark_train import busy, guards, step, train

from gptlab.data.files import available_cores

NEEDED = {"prepare": ("peer",), "memory": ("peer",), "time_to_loss": ("peer", "shakespeare")}
INSIDE = {"peer": "train.py", "mingpt": "mingpt/trainer.py", "shakespeare": ""}  # option -> what its path must have
# part -> what --size may name
MODELS = {"train": SIZES, "busy": SIZES, "step": SIZES, "sample": benchmark_sample.SIZES}
PACKAGES = ("torch", "lightning", "transformers", "accelerate")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a CPU


def sample(options: argparse.Namespace, folder: Path) -> Plan:
    """Tokens per second of generated text against Hugging Face's `generate` and nanoGPT's: same random weights, same
    sampler, a prompt of one token, then 250 (baby) or 100 (124M) new ones per row and no stop. Beside them, what the
    machine's memory can do."""
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


PARTS = {part.__name__: part for part in (train, time_to_loss, prepare, startup, guards, busy, step, sample, memory)}


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
    cpuinfo = ""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    lines = dict(line.partition(":")[::2] for line in cpuinfo.replace("\t", "").splitlines())
    flags = lines.get("flags", "").split()
    return {
        "cpu": lines.get("model name", platform.processor()).strip(),
        "cores": available_cores(),
        "features": [feature for feature in FEATURES if feature in flags],
        "gpus": output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "os": platform.platform(),
    }


def describe_software(options: argparse.Namespace) -> dict[str, str]:
    """Versions, and the commits of gptlab and of the peers' folders."""
    software = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            software[package] = version(package)
    folders = {"gptlab": Path(__file__).parents[1], "nanoGPT": options.peer, "minGPT": options.mingpt}
    return software | {name: commit_of(folder) for name, folder in folders.items() if folder}


def commit_of(folder: Path) -> str:
    if not (folder / ".git").exists():  # git would answer for a folder around it
        return "unknown commit"
    changes = output_of("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{output_of('git', '-C', str(folder), 'rev-parse', 'HEAD')}{' with changes' if changes else ''}"


def output_of(*command: str) -> str | None:
    """None if it fails, or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summarize(rounds: list[dict[str, float]], ratios: list[tuple[str, str]]) -> dict[str, list[float]]:
    """The values of each column and ratio, by round."""
    values = {column: [values[column] for values in rounds] for column in rounds[0]}
    for a, b in ratios:
        values[f"{a} / {b}"] = [values[a] / values[b] if values[b] else float("nan") for values in rounds]
    return values


def format_table(values: dict[str, list[float]], unit: str) -> str:
    """In Markdown, aligned for the terminal."""

    def show(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"

    statistic = {"median": statistics.median, "mean": statistics.mean, "lowest": min, "highest": max}
    width = max(map(len, (unit, *values)))
    lines = [f"| {unit:<{width}} |" + "".join(f" {name:>11} |" for name in statistic)]
    lines.append(f"|{'-' * (width + 2)}|" + f"{'-' * 12}:|" * len(statistic))
    for name, row in values.items():
        lines.append(f"| {name:<{width}} |" + "".join(f" {show(f(row)):>11} |" for f in statistic.values()))
    return "\n".join(lines)


def format_report(report: dict[str, Any]) -> str:
    """The whole report in Markdown: table, warnings and notes, and what it was measured on."""

    def show(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = [f"# {report['part']}, {report['date']}", "", format_table(report["values"], report["unit"]), ""]
    lines += [f"- **warning: {warning}**" for warning in report["warnings"]] + [f"- {note}" for note in report["notes"]]
    lines += [f"- command: `{' '.join(report['command'])}`", f"- rounds: {report['rounds']}"]
    facts = report["machine"] | report["software"]
    return "\n".join(lines + [f"- {name}: {show(value)}" for name, value in facts.items() if value]) + "\n"


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("overrides", nargs="*", help="for gptlab's runs, such as model.n_layer=8")
    parser.add_argument("--rounds", type=int, help="default: 7; time_to_loss: one for each of --seeds")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file, with machine and versions")
    parser.add_argument("--seconds", type=float, default=15, help="of training that a measurement takes")
    parser.add_argument("--warm-up", type=int, default=50, help="steps before that")
    parser.add_argument(
        "--peer", type=Path, help="a clone of https://github.com/karpathy/nanoGPT; startup, guards: unused"
    )
    parser.add_argument("--mingpt", type=Path, help="train: a clone of https://github.com/karpathy/minGPT")
    parser.add_argument(
        "--hardware", choices=("cpu", "gpu"), default="cpu", help="train, busy, time_to_loss, sample, memory"
    )
    parser.add_argument(
        "--size", nargs="+", choices=sorted({size for sizes in MODELS.values() for size in sizes}),
        help="models: of train, busy and step, cpu, baby and gpu (default: that of the hardware); of sample, baby and 124M (default: both)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", action="store_true", help="train, memory: gptlab and nanoGPT also with torch.compile"
    )
    parser.add_argument(
        "--spincount",
        default="1000",
        help="train, busy, time_to_loss: GOMP_SPINCOUNT of every program, or the word default: as each comes",
    )
    parser.add_argument(
        "--shakespeare", type=Path, help="time_to_loss: Tiny Shakespeare, the file input.txt of char-rnn"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1101, 1102, 1103], help="time_to_loss: one a round")
    parser.add_argument("--experiment", nargs="+", default=[*TARGETS], help="time_to_loss: of gptlab's")
    parser.add_argument("--documents", type=Path, help="prepare: JSON lines with a text each (default: written here)")
    parser.add_argument("--megabytes", type=int, default=500, help="prepare: of those written here")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sample: rows generated at once")
    parser.add_argument("--profile", action="store_true", help="sample: also where gptlab's time goes")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    parser = options_parser()
    options = parser.parse_intermixed_args(argv)
    for name in NEEDED.get(options.part, ()):
        if getattr(options, name) is None:
            parser.error(f"{options.part} needs --{name} PATH")
    for name, file in INSIDE.items():
        path = getattr(options, name)
        if path and not (path / file).is_file():
            parser.error(f"--{name} {path}: no such file {path / file}")
    if options.part in MODELS:
        options.size = options.size or ([*MODELS["sample"]] if options.part == "sample" else [options.hardware])
        if unknown := [size for size in options.size if size not in MODELS[options.part]]:
            parser.error(f"--size {' '.join(unknown)}: {options.part} has {', '.join(MODELS[options.part])}")
    if options.part == "time_to_loss" and options.rounds:
        parser.error("--rounds: time_to_loss has one for each of --seeds")
    options.rounds = options.rounds or (len(options.seeds) if options.part == "time_to_loss" else 7)
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    report: dict[str, Any] = {
        "part": options.part, "date": f"{datetime.date.today()}", "command": ["python", *sys.argv],
        "machine": describe_machine(), "software": describe_software(options), "warnings": [],
    }  # fmt: skip
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        plan = PARTS[options.part](options, Path(folder).resolve())
        report |= {"unit": plan.unit, "notes": plan.notes}
        print(json.dumps(report, indent=2), flush=True)
        for number in range(1, options.rounds + 1):
            if (in_use := cores_in_use()) and in_use > 0.1:
                busy = (
                    f"other processes kept {in_use:.1f} cores busy before round {number}; do not publish these figures"
                )
                report["warnings"].append(busy)
                print(f"warning: {busy}", flush=True)
            in_order = plan.measurements[:: 1 if number % 2 else -1]
            rounds.append({name: value for measure in in_order for name, value in measure().items()})
            report |= {"rounds": number, "values": summarize(rounds, plan.ratios)}
            print(f"\nround {number} of {options.rounds}\n{format_table(report['values'], plan.unit)}", flush=True)
            if options.json:  # after each round: a benchmark that is cut short leaves what it has
                options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
            if options.markdown:
                options.markdown.write_text(format_report(report), "utf-8")


if __name__ == "__main__":
    main()
