"""Train the same tiny runs with two versions of gptlab and compare them bitwise.

    python scripts/same_bits.py HEAD~20 .        # git revisions, or folders of checkouts

For changes that must not change any number. Compares weights, optimizer state and logged losses; exit status 1 if any
bit differs. Runs of one machine only: other CPUs and other versions of torch round differently.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

COMMON = ["hardware=cpu", "trainer.precision=32", "trainer.max_steps=20", "trainer.val_every=10", "trainer.log_every=5", "data.val_windows=40",
          "optim.warmup_steps=5"]  # fmt: skip
UNEVEN = ["model=gpt-nano", "model.dropout=0.2", "data.micro_batch_size=5"]
RUNS = {
    "default data and model": [],
    "dropout, uneven micro-batches": UNEVEN,
    "bf16": [*UNEVEN, "trainer.precision=bf16"],
    "addition": ["experiment=addition", "data.batch_size=32"],
    "EMA": [*UNEVEN, "callbacks=ema"],
    "2 processes": [*UNEVEN, "trainer.devices=2"],
}
LOSSES = ("train/loss", "train/grad_norm", "val/loss")


@contextlib.contextmanager
def checkout(version: str, folder: Path) -> Iterator[Path]:
    """A folder with that version: the folder itself, or a temporary git worktree of the revision."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), version], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True)


def train(source: Path, overrides: list[str], folder: Path) -> Path:
    """Train with the gptlab in `source`; returns the run folder."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "gptlab.train", *COMMON, *overrides, "hydra.run.dir=run"]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source}: {' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return folder / "run"


def read_values(run: Path) -> dict[str, Any]:
    """Tensors of the last checkpoint (as bytes) and logged losses, by name."""
    saved = torch.load(run / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    weights = [
        ("", saved["state_dict"]),
        ("not averaged ", saved.get("current_model_state", {})),
    ]  # the latter with EMA
    values: dict[str, Any] = {
        f"{kind}{name}": w.numpy().tobytes() for kind, state in weights for name, w in state.items()
    }
    for parameter, state in saved["optimizer_states"][0]["state"].items():
        values |= {f"optimizer/{parameter}/{name}": tensor.numpy().tobytes() for name, tensor in state.items()}
    for line in map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines()):
        values |= {f"{name} of step {line['step']}": line[name] for name in LOSSES if name in line}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs=2, metavar="VERSION", help="a git revision, or the folder of a checkout")
    versions = parser.parse_args().versions
    different = False
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary).resolve()
        sources = [stack.enter_context(checkout(version, folder / f"source{i}")) for i, version in enumerate(versions)]
        print(f"{'run':<32} {'values':>6}  differing")
        for number, (name, overrides) in enumerate(RUNS.items()):
            runs = [train(source, overrides, folder / f"{number}_{i}") for i, source in enumerate(sources)]
            a, b = map(read_values, runs)
            differing = sorted(key for key in a.keys() | b.keys() if key not in a or key not in b or a[key] != b[key])
            different |= bool(differing)
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            print(f"{name:<32} {len(a):>6}  {', '.join(differing[:3]) + more or 'none'}", flush=True)
    sys.exit(different)


if __name__ == "__main__":
    main()
