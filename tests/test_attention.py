"""Dropout by random bytes, and attention in blocks, against their definitions."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab.attention import BLOCK, Dropout, attention, draw

SEVERAL_BLOCKS = 2 * BLOCK + 22


@pytest.mark.parametrize("p", [0.01, 0.2])
def test_every_byte_of_a_random_word_is_uniform(p):
    """random_() fills only 63 of 64 bits by default: the last byte of each word would never be >= 128, or 0 in its
    first bit, and one element in eight would be kept too often."""
    torch.manual_seed(0)
    random, _, _ = draw(torch.empty(2**19), p)
    for byte in random.view(torch.uint8).view(-1, 8).T:
        expected = len(byte) / 256
        chi_squared = ((byte.int().bincount(minlength=256) - expected) ** 2 / expected).sum().item()
        assert 255 - 6 * 22.6 < chi_squared < 255 + 6 * 22.6  # mean and standard deviation for 256 values


@pytest.mark.parametrize("p", [1e-7, 0.001, 0.02, 1 / 32, 0.1, 0.2, 0.5, 0.97, 0.999, 1 - 1e-7])
def test_dropout_drops_p_and_keeps_the_mean(p):
    """A wrong threshold or factor shows: kept elements are all multiplied by the same 1 / (1 - the rate in force), which
    is p to 1/512 and the observed one within five standard deviations."""
    torch.manual_seed(0)
    x = torch.rand(2**20 + 3) + 1  # no multiple of 8: the last word is not used up
    y = Dropout(p)(x)
    kept, (_, _, factor) = y != 0, draw(x, p)
    torch.testing.assert_close(y[kept], x[kept] * factor)
    assert abs((1 - 1 / factor) - p) <= (1 / 512 if 1 / 32 <= p < 0.97 else 1 / 65536)
    deviation = math.sqrt((1 - 1 / factor) / factor / len(x))
    assert kept.double().mean().item() == pytest.approx(1 / factor, abs=5 * deviation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_the_gradient_is_that_of_the_output(dtype):
    """Also of a tensor in another memory order, whose mask must not be transposed."""
    torch.manual_seed(0)
    x = torch.ones(5, 33, dtype=dtype).T.requires_grad_()
    y, factor = Dropout(0.3)(x), draw(x, 0.3)[2]
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert y.dtype == x.grad.dtype == dtype
    assert 0 < (y == 0).sum() < y.numel()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0, gradient * factor))


def test_dropout_otherwise_is_torchs():
    x = torch.randn(4, 4)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_dropout_depends_on_torchs_seed_alone():
    """Resumes are exact because each step seeds it."""
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(torch.ones(100)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def inputs(T: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v (2, 3, T, D) in the memory order of the model's, (2, T, 3, D)."""
    return [torch.randn(2, T, 3, D, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("T", [1, 7, BLOCK, SEVERAL_BLOCKS])
def test_attention_with_dropout_equals_its_definition(T):
    """With the identity as v, the output is what was kept of the probabilities. Each must be 0 or the definition's; and
    with the same seed and any v, output and gradients must be those that autograd computes with that mask."""

    def ours(v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attention(q, k, v, dropout=0.3)

    q, k, v = inputs(T, T)
    identity = torch.eye(T, dtype=q.dtype).expand(2, 3, T, T)
    kept, factor = ours(identity) != 0, draw(q, 0.3)[2]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    probabilities = (q @ k.mT / math.sqrt(T)).masked_fill(future, -math.inf).softmax(-1)
    dropped = probabilities * kept * factor
    torch.testing.assert_close(ours(identity), dropped)
    if T >= BLOCK:
        count = 6 * T * (T + 1) / 2
        assert kept.sum().item() / count == pytest.approx(1 / factor, abs=5 * math.sqrt(0.3 * 0.7 / count))
    out, gradient = ours(v), torch.randn_like(v)
    torch.testing.assert_close(out, dropped @ v)
    expected = torch.autograd.grad(dropped @ v, (q, k, v), gradient)
    for name, x, y in zip("qkv", torch.autograd.grad(out, (q, k, v), gradient), expected, strict=True):
        torch.testing.assert_close(x, y, msg=f"gradient of {name}")


def test_attention_with_dropout_is_torchs_on_average():
    """Its expectation is attention without dropout: here over 2,000 identical sequences."""
    torch.manual_seed(0)
    q, k, v = (x[:1].expand(2000, -1, -1, -1) for x in inputs(8, 4, torch.float32))
    mean = attention(q, k, v, dropout=0.2).mean(0)
    torch.testing.assert_close(mean, F.scaled_dot_product_attention(q, k, v, is_causal=True)[0], atol=0.06, rtol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_attention_in_bfloat16_is_computed_in_float32(dropout):
    """Also under autocast, which would turn it back."""
    results = []
    torch.manual_seed(0)
    qkv = [x.bfloat16() for x in inputs(SEVERAL_BLOCKS, 8)]
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            results.append(attention(*(x.to(dtype) for x in qkv), dropout=dropout))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(results[0], results[1].bfloat16())


def test_attention_otherwise_is_torchs():
    """Bitwise: without dropout, and where one query sees all keys."""
    q, k, v = inputs(SEVERAL_BLOCKS, 8, torch.float32)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    last = q[:, :, -1:]
    assert torch.equal(attention(last, k, v, causal=False), F.scaled_dot_product_attention(last, k, v))
    assert attention(last, k, v, causal=False, dropout=0.5).shape == last.shape
