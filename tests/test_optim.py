"""Parameter groups and the schedule."""

import math

import pytest
import torch

from gptlab import optim
from gptlab.model import GPT


@pytest.mark.parametrize("bias", [True, False])
def test_groups_cover_every_parameter_once(bias):
    """Identity of the parameters, not their number: one forgotten and one doubled would still add up."""
    model = GPT(vocab_size=10, block_size=4, n_layer=2, n_head=2, n_embd=8, bias=bias)
    decayed, rest = optim.decay_groups(model, 0.1)
    grouped = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    matrices = {id(p) for name, p in model.named_parameters() if name.endswith("weight") and "ln_" not in name}
    assert {id(p) for p in decayed["params"]} == matrices
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not frozen for group in optim.decay_groups(model, 0.1) for p in group["params"])


COSINE = {"schedule": "cosine", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "decay_steps": 2000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-3 / 101), (99, 1e-3 * 100 / 101), (100, 1e-3), (575, 1e-4 + 0.5 * (1 + math.sqrt(0.5)) * 9e-4), (1050, 5.5e-4),
     (2000, 1e-4), (9999, 1e-4)],
)  # fmt: skip
def test_warmup_and_cosine(step, expected):
    assert optim.learning_rate(step, **COSINE) == pytest.approx(expected, rel=1e-12)


def test_constant_after_warmup():
    rates = [optim.learning_rate(step, **{**COSINE, "schedule": "constant"}) for step in (0, 100, 5000)]
    assert rates == [pytest.approx(1e-3 / 101), 1e-3, 1e-3]


@pytest.mark.parametrize(("warmup", "decay"), [(0, 10), (10, 10), (20, 10), (0, 0)])
def test_odd_lengths_do_not_divide_by_zero(warmup, decay):
    odd = COSINE | {"warmup_steps": warmup, "decay_steps": decay}
    rates = [optim.learning_rate(step, **odd) for step in range(30)]
    assert all(0 < rate <= 1e-3 for rate in rates) and rates[-1] == 1e-4


@pytest.mark.parametrize("norm", [1.0, math.nan, math.inf])
def test_skipping_on_the_device_does_what_skipping_on_the_host_does(norm):
    """Weights and state after a step, fused: a non-finite one must leave both as they were, a finite one must not."""
    ends = []
    for wait in (True, False):
        layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        adamw = optim.build(layer, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
        layer.weight.grad = torch.full((1, 2), norm)
        optim.skip_unless_finite(adamw, torch.tensor(norm), wait=wait)
        adamw.step()
        ends.append(layer.weight.detach())
    assert torch.equal(*ends) and torch.equal(ends[0], torch.ones(1, 2)) == (norm != 1.0)
