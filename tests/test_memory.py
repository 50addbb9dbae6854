"""The memory estimate against what a process that trains really takes, and the refusal of what cannot fit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gptlab import memory
from gptlab.memory import Estimate, capacity, check_fits, estimate
from gptlab.model import GPT

# Trains as gptlab.module does and prints by how many bytes the process grew at its peak. A small model goes first: what
# the libraries set up once is not the model's.
TRAIN = """
import json, re, sys
import torch
from torch.nn import functional as F
from gptlab import optim
from gptlab.model import GPT

def resident(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def train(model, precision, micro_batch_size, micro_batches, steps):
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for _ in range(steps):
        batch = torch.randint(0, model.vocab_size, (micro_batches * micro_batch_size, model.block_size + 1))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for ids in batch.split(micro_batch_size):
                logits, targets = model(ids[:, :-1]), ids[:, 1:]
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
                del logits
                with torch.autocast("cpu", enabled=False):
                    loss.backward()
            with torch.autocast("cpu", enabled=False):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

model, vocab_size, block_size, *how = json.loads(sys.argv[1])
torch.set_num_threads(1)
train(GPT(vocab_size=16, block_size=8, n_layer=1, n_head=1, n_embd=16), how[0], 2, 1, 2)
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
train(GPT(vocab_size=vocab_size, block_size=block_size, **model), *how, 3)
print(resident("VmHWM") - before)
"""

# name: n_layer, n_head, n_embd and what else of the model; vocabulary, block_size, micro_batch_size, precision, micro-batches
CASES = {
    "plain": ((4, 4, 128, {}), 65, 256, 20, "32", 1),
    "long": ((2, 4, 128, {}), 65, 2048, 4, "32", 1),
    "dropout": ((3, 4, 128, {"dropout": 0.2}), 65, 256, 12, "32", 1),
    "bf16": ((4, 4, 256, {}), 512, 128, 24, "bf16", 1),
    "bf16 and dropout": ((3, 4, 256, {"dropout": 0.2}), 65, 128, 24, "bf16", 1),
    "checkpointing": ((8, 4, 128, {"activation_checkpointing": True}), 65, 128, 48, "32", 1),
    "large vocabulary": ((2, 4, 192, {"bias": True}), 50257, 32, 8, "32", 1),
    "large tensors": ((1, 2, 64, {}), 65, 64, 2056, "32", 1),
    "accumulated": ((3, 8, 512, {"gelu": "tanh"}), 8192, 64, 8, "32", 2),
}


def model_config(n_layer, n_head, n_embd, other):
    return {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, **other}


def expected(case) -> Estimate:
    model, vocab_size, block_size, micro_batch_size, precision, micro_batches = case
    return estimate(
        model_config(*model), vocab_size, block_size, micro_batch_size, precision, accumulates=micro_batches > 1
    )


def measured(case, **environment) -> int:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process's memory is read from /proc, which is Linux's")
    model, vocab_size, block_size, micro_batch_size, precision, micro_batches = case
    argument = json.dumps([model_config(*model), vocab_size, block_size, precision, micro_batch_size, micro_batches])
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, argument],
        capture_output=True,
        text=True,
        timeout=120,
        env=env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("dropout", "checkpointing") else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
        if name != "large tensors"
    ],
)
def test_the_tensors_are_counted_within_10_percent(name):
    """Where every tensor has a mapping of its own, a process grows by its tensors alone: a tensor that the formula
    forgets or counts twice shows. (In fact the formula is within 7 % on all of these.)"""
    needed = expected(CASES[name])
    real = measured(CASES[name], MALLOC_MMAP_THRESHOLD_="200000")
    assert needed.total - needed.allocator == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("large vocabulary", 0.15),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("large tensors", 0.15), ("dropout", 0.25))),
        pytest.param("checkpointing", 0.25, marks=pytest.mark.slow),
    ],
)
def test_the_total_holds_with_the_allocator_as_it_comes(name, error):
    """Large tensors are mapped and must not be charged for the heap. Of small ones glibc's heap keeps what differs by
    a tenth from run to run; the tensors alone would be too few by 30 % (dropout) and 55 % (checkpointing)."""
    assert expected(CASES[name]).total == pytest.approx(measured(CASES[name]), rel=error)


@pytest.mark.parametrize("vocab_multiple", [1, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(1, 1, 8), (3, 3, 48), (5, 2, 20)])
def test_parameters_are_those_of_the_model(n_layer, n_head, n_embd, bias, vocab_multiple):
    """A matrix, bias or padding that is forgotten, or a tied one counted twice, would differ."""
    config = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "bias": bias, "vocab_multiple": vocab_multiple}
    real = 4 * sum(p.numel() for p in GPT(vocab_size=67, block_size=16, **config).parameters())
    needed = estimate(config | {"_target_": "gptlab.model.GPT", "compile": True}, 67, 16, 2, "32")
    assert (needed.parameters, needed.gradients, needed.optimizer) == (real, real, 2 * real)


def gpt2(vocab_size=50257, precision="bf16", device_type="cuda", **other):
    """What an estimate by micro-batch size is for GPT-2's smallest model."""
    config = model_config(12, 12, 768, {"bias": True, **other})
    return lambda micro_batch_size: estimate(config, vocab_size, 1024, micro_batch_size, precision, device_type)


def test_ten_million_tokens_of_vocabulary_are_refused_at_once_and_without_allocating():
    """768 numbers for each of 10 million tokens are 28.6 GiB; were they allocated, or listed, it would show."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(ValueError, match="takes about") as refused:
        check_fits(gpt2(vocab_size=10_000_000), 8, 24 * 2**30)
    assert time.process_time() - began < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**23 / unit
    text = str(refused.value)
    for part in ("parameters 28.9 GiB", "optimizer state 57.9 GiB", "activations", "24.0 GiB", "too large"):
        assert part in text
    for key in ("model.n_layer", "model.n_embd", "vocabulary", "data.block_size"):
        assert key in text


@pytest.mark.parametrize("gib", [6, 11, 16, 24, 40])
@pytest.mark.parametrize("micro_batch_size", [100, 256])
def test_the_suggested_micro_batch_size_fits_and_twice_that_does_not(gib, micro_batch_size):
    estimate_of, there = gpt2(), gib * 2**30
    with pytest.raises(ValueError, match=r"micro_batch_size=\d+ would fit") as refused:
        check_fits(estimate_of, micro_batch_size, there)
    suggested = int(str(refused.value).split(" would fit")[0].split("=")[-1])
    check_fits(estimate_of, suggested, there)
    with pytest.raises(ValueError, match=f"micro_batch_size={suggested} would fit"):
        check_fits(estimate_of, 2 * suggested, there)


def test_only_what_is_beyond_the_estimates_error_is_refused():
    def estimate_of(micro_batch_size):
        return Estimate(parameters=10, gradients=10, optimizer=20, activations=60 * micro_batch_size)

    check_fits(estimate_of, 1, 88)  # 100 of 88: 14 % too much
    with pytest.raises(ValueError, match=r"about 100 B \("):
        check_fits(estimate_of, 1, 86)  # 16 %


def test_what_saves_memory_saves_memory():
    """On one of the devices each of these would otherwise be without effect, or with the wrong sign."""
    few = {"vocab_size": 512}  # or the logits outweigh the blocks
    plain = gpt2(**few)(8).total
    assert gpt2(**few, activation_checkpointing=True)(8).total < 0.6 * plain
    assert plain < 0.8 * gpt2(**few, precision="32")(8).total
    assert plain < gpt2(**few, dropout=0.1)(8).total < 1.2 * plain  # CUDA's attention keeps no matrix of T x T
    matrices = 12 * 3 * (8 * 12 * 1024 * 1024 * 4)  # and MPS's three for each of 12 blocks and heads, in float32
    assert gpt2(**few, device_type="mps", dropout=0.1)(8).total > plain + 0.9 * matrices


def test_capacity_is_the_machines_or_its_containers(tmp_path, monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMITS", (limit, tmp_path / "absent"))
    assert capacity(torch.device("cpu")) == machine > 2**28
    for text, is_there in [("max\n", machine), ("123456789\n", 123456789), (f"{2**63 - 4096}\n", machine)]:
        limit.write_text(text)
        assert capacity(torch.device("cpu")) == is_there


def test_the_real_capacity_is_positive():
    """Whatever files this machine has: they are read without an error."""
    assert capacity(torch.device("cpu")) > 2**28
