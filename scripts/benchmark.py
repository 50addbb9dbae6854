"""Tokens per second of `python -m gptlab.train` against nanoGPT's own train.py: python scripts/benchmark.py NANOGPT

NANOGPT is a checkout of https://github.com/karpathy/nanoGPT. Both train the same model on the same text, batch and
optimizer settings, in 32 bits, with their logging on, one after the other in turns, on a machine that must be idle.
A round runs each side for a few and for many steps; the difference of the two whole-process times is what the steps
in between cost, whatever starting, validating and saving cost. The ratio is the median over the rounds.
"""

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptlab.data.files import python_docs
from gptlab.tokenizer import CharTokenizer

# nanoGPT's README settings for a CPU; gptlab's default model and data sizes are the same.
MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0}
TOKENS_PER_STEP = 12 * 64
FEW, MANY = 50, 550


def nanogpt_command(folder: Path, steps: int) -> list[str]:
    settings = {
        **MODEL, "block_size": 64, "batch_size": 12, "gradient_accumulation_steps": 1, "dataset": str(folder),
        "device": "cpu", "compile": False, "dtype": "float32", "max_iters": steps, "lr_decay_iters": MANY,
        "learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": 10, "eval_interval": 10**9,
        "eval_iters": 1, "log_interval": 10, "out_dir": str(folder / "out"),
    }  # fmt: skip
    return [sys.executable, "train.py", *(f"--{key}={value}" for key, value in settings.items())]


def gptlab_command(folder: Path, steps: int) -> list[str]:
    settings = {
        **{f"model.{key}": value for key, value in MODEL.items()}, "hardware": "cpu", "trainer.precision": 32,
        "data.block_size": 64, "data.batch_size": 12, "data.val_windows": 1, "trainer.max_steps": steps,
        "trainer.val_every": MANY, "trainer.log_every": 10, "optim.decay_steps": MANY, "optim.warmup_steps": 10,
        "callbacks.sample_text.max_new_tokens": 1, "hydra.run.dir": folder / f"run_{time.time_ns()}",
    }  # fmt: skip
    return [sys.executable, "-m", "gptlab.train", *(f"{key}={value}" for key, value in settings.items())]


def write_nanogpt_data(folder: Path) -> None:
    """The default run's text as nanoGPT wants it."""
    text = python_docs()
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text).astype("uint16")
    ids[: int(0.9 * len(ids))].tofile(folder / "train.bin")
    ids[int(0.9 * len(ids)) :].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))


def seconds(command: list[str], folder: Path) -> float:
    started = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment["PYTHONWARNINGS"] = "ignore"  # nanoGPT's use of an older torch
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    nanogpt = arguments.nanogpt.resolve()
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_nanogpt_data(folder)
        sides = {"gptlab": (gptlab_command, Path.cwd()), "nanoGPT": (nanogpt_command, nanogpt)}
        for round_number in range(arguments.rounds):
            speed = {}
            for name, (command, place) in list(sides.items())[:: 1 if round_number % 2 else -1]:
                few, many = (seconds(command(folder, steps), place) for steps in (FEW, MANY))
                speed[name] = (MANY - FEW) * TOKENS_PER_STEP / (many - few)
            ratios.append(speed["gptlab"] / speed["nanoGPT"])
            shown = ", ".join(f"{name} {value:,.0f} tokens/s" for name, value in speed.items())
            print(f"round {round_number + 1}: {shown}, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio over {len(ratios)} rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
