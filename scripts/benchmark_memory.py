"""The part `memory` of benchmark.py: peak memory and time of a training step of GPT-2 124M, each in a process of its own.

A process trains a few steps on random tokens and prints {"GB": ..., "s": ...}: the most memory that it had (on a CPU its
resident set, with Python and the libraries; on a GPU what torch allocated), and the median time of a step but the first.
"""

import functools
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import benchmark_programs as programs
import numpy as np
import torch
from torch import Tensor

VOCAB_SIZE = 50257
SIZE = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False}
MICRO_BATCH, STEPS = {"cpu": 4, "cuda": 12}, {"cpu": 3, "cuda": 20}
LR, BETAS, WEIGHT_DECAY, GRAD_CLIP = 6e-4, (0.9, 0.95), 0.1, 1.0  # nanoGPT's config/train_gpt2.py


def columns(
    peer: Path, device: str, compiled: bool = False
) -> tuple[list[Callable[[], dict[str, float]]], list[tuple[str, str]]]:
    """Measurements, fp32 on CPUs and bf16 on GPUs, and the ratios of interest."""
    measurements, ratios = [], []
    for compile_ in (False, True) if compiled else (False,):
        ours, theirs = (f"{name}{' compiled' if compile_ else ''}" for name in ("gptlab", "nanoGPT"))
        for column in (ours, theirs):
            measurements.append(functools.partial(measure, column, peer, device, compile_))
        ratios += [(f"{ours}, {unit}", f"{theirs}, {unit}") for unit in ("GB", "s")]
    return measurements, ratios


def measure(column: str, peer: Path, device: str, compile_: bool) -> dict[str, float]:
    program = column.partition(" ")[0]
    command = [sys.executable, str(Path(__file__).resolve()), program, str(peer), device, str(compile_)]
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        output = Path(folder) / "output.txt"
        programs.time_of(command, Path(folder), output, {"GOMP_SPINCOUNT": "1000"})  # gptlab's default, for both
        measured = json.loads(output.read_text("utf-8").splitlines()[-1])
    return {f"{column}, {unit}": value for unit, value in measured.items()}


def train_gptlab(peer: Path, batches: list[Tensor], device: str, compile_: bool) -> list[float]:
    """Seconds of each step of gptlab's module in Lightning's loop."""
    import lightning as L  # here: nanoGPT's process does without

    from gptlab.model import GPT
    from gptlab.module import GPTModule

    class Clock(L.Callback):
        seconds: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, *_: object) -> None:
            self.began = now(device)

        def on_train_batch_end(self, *_: object) -> None:
            self.seconds.append(now(device) - self.began)

    model = GPT(vocab_size=VOCAB_SIZE, **SIZE)
    if compile_:
        model.compile()
    optim = {"lr": LR, "min_lr": LR, "schedule": "constant", "warmup_steps": 0, "decay_steps": 0, "betas": BETAS,
             "weight_decay": WEIGHT_DECAY, "grad_clip": GRAD_CLIP, "skip_nonfinite": 0, "cooldown": 1.0}  # fmt: skip
    module = GPTModule(model, optim_config=optim, token_bytes=np.ones(VOCAB_SIZE, dtype=np.int64), seed=1,
                       micro_batch_size=None, log_every=10, metadata={})  # fmt: skip
    trainer = L.Trainer(accelerator=device, devices=1, precision="32-true" if device == "cpu" else "bf16-mixed",
                        max_steps=len(batches), logger=False, callbacks=[Clock()], enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return Clock.seconds


def train_nanogpt(peer: Path, batches: list[Tensor], device: str, compile_: bool) -> list[float]:
    """Seconds of each step, in the order and with the names of nanoGPT's train.py, on which the life of tensors depends."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=VOCAB_SIZE, **SIZE)).to(device)
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, device)
    model = torch.compile(model) if compile_ else model
    seconds = []
    for batch in batches:
        began, ids = now(device), batch.to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            logits, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())  # noqa: RUF059
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(now(device) - began)
    return seconds


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str) -> int:
    """Bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(program: str, peer: str, device: str, compile_: str) -> None:
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high" if device != "cpu" else "highest")
    batches = torch.randint(0, VOCAB_SIZE, (STEPS[device], MICRO_BATCH[device], SIZE["block_size"] + 1))
    train = {"gptlab": train_gptlab, "nanoGPT": train_nanogpt}[program]
    seconds = train(Path(peer), list(batches), device, compile_ == "True")
    print(json.dumps({"GB": peak(device) / 1e9, "s": statistics.median(seconds[1:])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
