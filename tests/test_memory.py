"""The memory estimate against the tensors of the real training step and the growth of a real process; the refusal."""

import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from test_model import FAST
from test_module import OPTIM
from torch.utils.data import DataLoader

from gptlab import memory
from gptlab.callbacks.ema import EMA
from gptlab.errors import UserError
from gptlab.memory import Estimate, LiveBytes, capacity, check_fits, estimate_step
from gptlab.model import GPT
from gptlab.module import GPTModule


class Bigram(torch.nn.Module):
    """A custom model with a frozen part, which has no gradient and no optimizer state."""

    def __init__(self, vocab_size: int, block_size: int, width: int = 64) -> None:
        super().__init__()
        self.frozen = torch.nn.Embedding(vocab_size, width).requires_grad_(False)
        self.head = torch.nn.Linear(width, vocab_size)

    def forward(self, ids):
        return self.head(self.frozen(ids).cumsum(1).tanh())


def build(model: dict, vocab_size: int, block_size: int) -> torch.nn.Module:
    sizes = {"vocab_size": vocab_size, "block_size": block_size}
    return Bigram(**sizes) if model == {} else GPT(**sizes, **{"n_layer": 3, "n_head": 4, "n_embd": 64} | model)


# What of GPT differs from 3 layers, 4 heads, 64 channels ({}: a custom model); vocabulary, block_size, sequences,
# micro_batch_size, precision
CASES = {
    "long": ({"n_layer": 2}, 65, 512, 2, 2, "32"),
    "bf16, dropout, micro-batches": ({"dropout": 0.2}, 65, 64, 8, 4, "bf16"),
    "checkpointing": ({"n_layer": 8, "activation_checkpointing": True, "dropout": 0.1}, 65, 64, 4, 4, "32"),
    "large vocabulary": ({"n_layer": 1, "bias": True, "vocab_multiple": 64}, 50257, 16, 2, 2, "32"),
    "loss in chunks": ({"n_layer": 1, "vocab_multiple": 64}, 50257, 256, 2, 2, "32"),
    "loss in chunks, bf16": ({"n_layer": 1}, 50257, 256, 2, 2, "bf16"),
    "micro-batches": ({"n_head": 8, "n_embd": 256, "gelu": "tanh"}, 1024, 32, 4, 2, "32"),
    "ema": ({"n_embd": 128}, 65, 32, 4, 4, "32"),
    "Muon, n-grams, rotary": ({**FAST, "ngram_rows": 2000, "ngram_dropout": 0.3}, 65, 64, 4, 4, "32"),
    "custom": ({}, 65, 64, 4, 4, "32"),
}


def optim_of(name: str) -> dict:
    return OPTIM | {"muon_lr": 0.02, "embedding_lr": 0.03, "head_lr": 0.01, "grad_clip": 0} if "Muon" in name else OPTIM


def expected(name: str) -> Estimate:
    model, vocab_size, block_size, sequences, micro_batch_size, precision = CASES[name]
    return estimate_step(partial(build, model, vocab_size, block_size), block_size=block_size, sequences=sequences, optim_config=optim_of(name),
                         micro_batch_size=micro_batch_size, precision=precision, device_type="cpu", averaged=name == "ema")  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_the_real_step_takes(name, tmp_path):
    """Two steps of GPTModule under Lightning's Trainer, on real tensors that are counted the same way. A tensor that
    the estimate forgets or keeps too long shows: the smallest that matters, weights in 16 bits, is 6 % of a case."""
    model, vocab_size, block_size, sequences, micro_batch_size, precision = CASES[name]
    batches = torch.randint(0, vocab_size, (2, sequences, block_size + 1))
    with LiveBytes() as live:
        module = GPTModule(
            build(model, vocab_size, block_size), optim_config=optim_of(name), token_bytes=np.ones(vocab_size, dtype=np.int64),
            seed=1, micro_batch_size=micro_batch_size, log_every=1, metadata={},
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", max_steps=2, precision={"32": "32-true", "bf16": "bf16-mixed"}[precision], logger=False,
            callbacks=[EMA(0.9)] if name == "ema" else [], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(list(batches), batch_size=None))
    assert 0.94 * live.peak <= expected(name).peak <= 1.005 * live.peak


@pytest.mark.parametrize(("sequences", "micro_batch_size", "measured"), [(2, 2, 303), (2, 1, 389)])
def test_the_estimate_for_fsdp(sequences, micro_batch_size, measured):
    """Measured (MiB): by how much each of two processes grew, without what the libraries took; 120 are weights, of which
    it keeps half, half of the moments, and all in a validation. Several micro-batches keep whole gradients."""
    model = {"n_layer": 10, "n_head": 8, "n_embd": 512}
    estimate = estimate_step(partial(build, model, 103, 64), block_size=64, sequences=sequences, precision="32",
                             micro_batch_size=micro_batch_size, device_type="cpu", shards=2)  # fmt: skip
    assert 0.95 * measured * 2**20 <= estimate.peak <= 1.2 * measured * 2**20


# Trains and prints by how many bytes the process grew at its peak. A small model goes first: what the libraries set up
# once is not the model's.
TRAIN = """
import re
import torch
from torch.nn import functional as F
from gptlab import optim
from gptlab.model import GPT

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(model, batch):
    optimizer = optim.build(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(2):
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
train(GPT(vocab_size=16, block_size=8, n_layer=1, n_head=1, n_embd=16), torch.zeros(2, 9, dtype=torch.int64))
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
train(GPT(vocab_size=65, block_size=256, n_layer=3, n_head=4, n_embd=64, dropout=0.2), torch.zeros(8, 257, dtype=torch.int64))
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
def test_a_process_grows_by_its_tensors():
    """Counted by the kernel, where the C library maps every tensor on its own: what no count of ours would see, such as
    buffers inside a kernel, would show here."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    env |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "200000"}
    grown = int(subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, check=True, env=env).stdout)
    estimate = estimate_step(partial(build, {"dropout": 0.2}, 65, 256), block_size=256, sequences=8, micro_batch_size=8,
                             precision="32", device_type="cpu")  # fmt: skip
    assert estimate.peak == pytest.approx(grown, rel=0.1)


def test_no_estimate_where_control_flow_depends_on_values():
    class LooksAtValues(Bigram):
        def forward(self, ids):
            return super().forward(ids) * (2 if ids.sum() > 3 else 1)

    assert estimate_step(lambda: LooksAtValues(9, 8), block_size=8, sequences=2, micro_batch_size=2, precision="32",
                         device_type="cpu") is None  # fmt: skip
    assert check_fits(lambda size: None, 4, 1) is None


def test_ten_million_tokens_of_vocabulary_are_refused_without_allocating():
    """768 numbers for each are 28.6 GiB; were they allocated, or drawn, it would show."""
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    model = {"n_layer": 1, "n_head": 12, "n_embd": 768}
    estimate = partial(estimate_step, partial(build, model, 10_000_000, 1024), block_size=1024, sequences=16,
                       precision="bf16", device_type="cpu")  # fmt: skip
    with pytest.raises(UserError, match=r"\(\d+.\d GiB weights.* 24.0 GiB available; not even one") as refused:
        check_fits(lambda size: estimate(micro_batch_size=size), 4, 24 * 2**30)
    assert time.process_time() - began < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**27 / (1 if sys.platform == "darwin" else 1024)
    assert "model.activation_checkpointing=true" in str(refused.value)


@pytest.mark.parametrize(
    ("available", "remedy"),
    [
        (799, "try data.micro_batch_size=7"),
        (500, "=5"),
        (499, "=4"),
        (100, "=1"),
        (99, "not even one sequence fits; .*"),
    ],
)
def test_the_suggested_micro_batch_size_is_the_largest_that_fits(available, remedy):
    def estimate(size: int) -> Estimate:
        return Estimate(peak=100 * size, state=0, device_type="cpu")

    assert "available" in check_fits(estimate, 8, 800)
    with pytest.raises(UserError, match=f"^data.micro_batch_size=8 needs .*{remedy}$"):
        check_fits(estimate, 8, available)


def test_the_random_numbers_of_a_run_stay_where_they_were():
    before = torch.get_rng_state()
    expected("bf16, dropout, micro-batches")
    assert torch.equal(torch.get_rng_state(), before)


def test_capacity_is_the_machines_or_its_control_groups(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < capacity(torch.device("cpu")) <= machine  # whatever files this machine has
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    assert capacity(torch.device("cpu")) == machine
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/slurm/job_1\n")
    (tmp_path / "slurm/job_1").mkdir(parents=True)
    for folder, text, limit in [("slurm/job_1", "max", machine), ("", f"{2**63 - 4096}\n", machine),
                                ("slurm/job_1", "123456789\n", 123456789), ("", "9999\n", 9999)]:  # fmt: skip
        (tmp_path / folder / "memory.max").write_text(text)
        assert capacity(torch.device("cpu")) == limit
