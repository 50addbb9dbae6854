"""Sampling, on models whose logits are known."""

import pytest
import torch
from torch import nn

from gptlab.errors import UserError
from gptlab.generate import generate, sample_next
from gptlab.model import GPT


class Successor(nn.Module):
    """Predicts id + 1, and notes how long a context it was given."""

    vocab_size, block_size = 10, 4

    def __init__(self):
        super().__init__()
        self.lengths = []

    def forward(self, idx):
        self.lengths.append(idx.shape[1])
        return nn.functional.one_hot((idx + 1) % 10, 10) * 5.0


def ids(*arguments, **settings):
    return [next_id.flatten().tolist() for next_id in generate(*arguments, **settings)]


def test_greedy_takes_the_most_likely_and_crops_to_block_size():
    model = Successor()
    assert ids(model, torch.tensor([[1], [7]]), 6, temperature=0) == [[2, 8], [3, 9], [4, 0], [5, 1], [6, 2], [7, 3]]
    assert model.lengths == [1, 2, 3, 4, 4, 4]
    assert ids(model, torch.arange(10)[None], 2, temperature=0) == [[0], [1]]  # a prompt longer than block_size


def test_sampled_frequencies_follow_the_softmax():
    """20,000 draws at temperature 2 lie within 4 standard errors of softmax(logits / 2)."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    draws = sample_next(logits.expand(20_000, 4), 2.0, None, generator).flatten()
    expected = (logits[0] / 2).softmax(-1)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((draws.bincount(minlength=4) / 20_000 - expected).abs() < 4 * error).all()


def test_top_k_draws_from_the_k_best_only():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(2000, 4)
    drawn = set(sample_next(logits, 5.0, 2, torch.Generator().manual_seed(0)).flatten().tolist())
    assert drawn == {1, 2}


def test_tiny_temperature_is_greedy_without_overflow():
    assert sample_next(torch.tensor([[1.0, 1.5, -torch.inf]]), 1e-38, None, None).item() == 1


def test_the_generator_decides():
    model = GPT(vocab_size=20, block_size=8, n_layer=1, n_head=1, n_embd=8).eval()
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    texts = [ids(model, prompt, 30, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_padding_is_never_drawn():
    model = GPT(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_multiple=64).eval()
    drawn = ids(model, torch.zeros(50, 1, dtype=torch.int64), 20, temperature=100.0)
    assert {i for row in drawn for i in row} == {0, 1, 2}


def test_weights_that_are_not_finite_are_refused():
    """Else softmax of NaN would draw garbage, or fail deep in torch."""
    model = GPT(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8).eval()
    model.lm_head.weight.data[1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        ids(model, torch.zeros(1, 1, dtype=torch.int64), 2)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "T >= 1"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.tensor([[10]]), "vocabulary 0..9"),
        (torch.tensor([[-1]]), "vocabulary 0..9"),
    ],
)
def test_bad_prompts_are_refused(prompt, text):
    with pytest.raises(UserError, match=text):
        next(generate(Successor(), prompt, 1))
