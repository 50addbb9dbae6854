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
    decayed, rest = optim.parameter_groups(model, 0.1, 1e-3, {})
    grouped = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
    matrices = {id(p) for name, p in model.named_parameters() if name.endswith("weight") and "ln_" not in name}
    assert {id(p) for p in decayed["params"]} == matrices
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    assert all(p is not frozen for group in optim.parameter_groups(model, 0.1, 1e-3, {}) for p in group["params"])


COSINE = {"schedule": "cosine", "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "decay_steps": 2000}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1e-3 / 101), (99, 1e-3 * 100 / 101), (100, 1e-3), (575, 1e-4 + 0.5 * (1 + math.sqrt(0.5)) * 9e-4), (1050, 5.5e-4),
     (2000, 1e-4), (9999, 1e-4)],
)  # fmt: skip
def test_warmup_and_cosine(step, expected):
    assert optim.learning_rate(step, **COSINE) == pytest.approx(expected, rel=1e-12)


def test_linear_falls_at_the_end_alone():
    """Half of the steps at the full rate, then a line; the last update, after step 1,999, still moves the weights."""
    line = COSINE | {"schedule": "linear", "cooldown": 0.5}
    rates = [optim.learning_rate(step, **line) for step in (100, 999, 1500, 1999, 2000, 9999)]
    assert rates == pytest.approx([1e-3, 1e-3, 5.5e-4, 1e-4 + 9e-7, 1e-4, 1e-4], rel=1e-12)
    early = [optim.learning_rate(step, **line | {"warmup_steps": 1500}) for step in (1499, 1500, 1750)]
    assert early == pytest.approx([1e-3 * 1500 / 1501, 1e-3, 5.5e-4], rel=1e-12)


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


def options(**changes):
    return {"fused": True, "lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.0, "muon_lr": 0.02, "embedding_lr": 0.03,
            "head_lr": 0.005, **changes}  # fmt: skip


def untied():
    torch.manual_seed(0)
    return GPT(vocab_size=10, block_size=4, n_layer=2, n_head=2, n_embd=8, bias=True, tie_weights=False, ngrams=[2])


def test_kinds_of_parameters_have_their_learning_rates():
    """By name, so that one in the wrong group is seen; a frozen one and biases would be seen too."""
    model = untied()
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: g["lr_scale"] * 1e-2 for g in optim.build(model, **options()).param_groups for p in g["params"]}
    assert len(rates) == len(names)
    for name, rate in rates.items():
        matrix = name.endswith("weight") and "ln_" not in name
        kind = "head" if "lm_head" in name else "block" if ".h." in name else "embedding"
        expected = {"head": 0.005, "block": 0.02, "embedding": 0.03}[kind] if matrix else 1e-2
        assert rate == pytest.approx(expected), name
    tied = GPT(vocab_size=10, block_size=4, n_layer=1, n_head=2, n_embd=8)
    with pytest.raises(ValueError, match="lacks: head"):  # it is the embedding
        optim.build(tied, **options())
    groups = optim.build(tied, **options(head_lr=None)).param_groups
    assert {g["kind"] for g in groups} == {"embedding", "block", "rest"}


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (20, 8)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    """In the basis of its own singular vectors, the result must be diagonal with values near 1. (24, 8) is three squares."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = optim.orthogonalize(matrices, 5)
    squares = shape[0] % shape[1] == 0
    parts = (matrices.view(-1, 8, 8), results.view(-1, 8, 8)) if squares else (matrices, results)
    for matrix, result in zip(*parts, strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        diagonal = u.T @ result @ vh.T
        values = diagonal.diagonal()[s > 0.05 * s[0]]  # the smallest take more steps
        torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-10, rtol=0)
        assert ((values > 0.6) & (values < 1.25)).all(), values


def test_muon_steps_are_the_definition():
    """Two steps of a matrix against the formulas, one matrix at a time, with Nesterov's momentum and decoupled decay; the rest
    of the model against torch's AdamW."""
    model, reference = untied(), untied()
    muon = optim.build(model, **options(weight_decay=0.1, momentum=0.9, newton_schulz_steps=5))
    adamw = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-2 * group["lr_scale"], "weight_decay": group["weight_decay"]}
         for group in optim.parameter_groups(reference, 0.1, 1e-2, {"block": 0.02, "embedding": 0.03, "head": 0.005})
         if group["kind"] != "block" for p in group["params"]], betas=(0.8, 0.95)
    )  # fmt: skip
    averages = {}
    for step in range(2):
        gradients = {
            n: torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for n, p in model.named_parameters()
        }
        for ours in (model, reference):
            for name, parameter in ours.named_parameters():
                parameter.grad = gradients[name].clone()
        for group in muon.param_groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        muon.step()
        adamw.step()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if ".h." in name and p.dim() == 2:
                    averages[name] = 0.9 * averages.get(name, 0) + 0.1 * p.grad
                    update = optim.orthogonalize((0.1 * p.grad + 0.9 * averages[name])[None], 5)[0]
                    p.copy_(p * (1 - 0.02 * 0.1) - 0.02 * update)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wait", [True, False])
def test_muon_skips_a_step_that_is_not_finite(wait):
    """On the host gradients are taken away, on the device `found_inf` tells: weights and averages must stay as they are."""
    model = untied()
    muon = optim.build(model, **options())
    for norm in (torch.tensor(1.0), torch.tensor(math.nan)):
        kept = [
            t.clone() for t in (*model.parameters(), *(s["momentum"] for s in muon.state.values() if "momentum" in s))
        ]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm.item()) + torch.rand_like(parameter)
        optim.skip_unless_finite(muon, norm, wait=wait)
        muon.step()
    now = [*model.parameters(), *(s["momentum"] for s in muon.state.values() if "momentum" in s)]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True)) and len(now) > len([*model.parameters()])
