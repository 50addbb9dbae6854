"""Sampling, on models whose logits are known, and the cache against the model without one."""

import itertools

import pytest
import torch
from torch import nn

from gptlab.errors import UserError
from gptlab.generate import Sampler, generate
from gptlab.model import GPT

GREEDY = Sampler(temperature=0)


class Successor(nn.Module):
    """Predicts id + 1, and notes how long a context it was given."""

    vocab_size, block_size = 10, 4

    def __init__(self):
        super().__init__()
        self.lengths, self.weight = [], nn.Parameter(torch.zeros(1))

    def forward(self, idx):
        self.lengths.append(idx.shape[1])
        return nn.functional.one_hot((idx + 1) % 10, 10) * 5.0


class Uncached(nn.Module):
    """A model without `new_cache`, as a custom one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.vocab_size, self.block_size = model, model.vocab_size, model.block_size

    def forward(self, idx):
        return self.model(idx)


def gpt(seed=0, **changes):
    """Weights so large that the likeliest token leads by far: rounding decides nothing."""
    torch.manual_seed(seed)
    model = GPT(**{"vocab_size": 20, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "bias": True} | changes)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model.eval()


def rows(*arguments, **settings):
    """The new ids of each row."""
    steps = list(generate(*arguments, **settings))
    return [[new for new in row if new is not None] for row in zip(*steps, strict=True)]


def test_greedy_takes_the_most_likely_and_crops_to_block_size():
    model = Successor()
    assert rows(model, [[1], [7]], 6, sampler=GREEDY) == [[2, 3, 4, 5, 6, 7], [8, 9, 0, 1, 2, 3]]
    assert model.lengths == [1, 2, 3, 4, 4, 4]
    assert rows(model, [range(10)], 2, sampler=GREEDY) == [[0, 1]]  # a prompt longer than block_size


def test_half_a_context_is_filled_up_again():
    model = Successor()
    rows(model, [[1]], 9, sampler=GREEDY, context="half")
    assert model.lengths == [1, 2, 3, 4, 2, 3, 4, 2, 3]


@pytest.mark.parametrize("padding", [1, 64])
def test_cached_logits_are_those_of_the_whole_sequence(padding):
    model, ids = gpt(vocab_multiple=padding), torch.randint(20, (3, 16))
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(3)
        steps = [model(ids[:, :5], cache), *(model(ids[:, i : i + 1], cache) for i in range(5, 16))]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 4:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        model(ids[:, :1], cache)


def test_a_cache_while_training_with_checkpointing():
    """Recomputing a block would write into the cache twice."""
    model, ids = gpt(activation_checkpointing=True).train(), torch.randint(20, (2, 6))
    cache = model.new_cache(2, 6)
    steps = [model(ids[:, :5], cache), model(ids[:, 5:], cache)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids)[:, 4:], atol=1e-5, rtol=1e-5)


def test_a_cache_grows_by_one_token():
    """Attention would let the first of several new tokens see too little."""
    model = gpt()
    cache = model.new_cache(1)
    model(torch.zeros(1, 2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache)


@pytest.mark.parametrize(("context", "sampler"), [*itertools.product(("full", "half"), (GREEDY, Sampler(0.7, 8)))])
def test_with_and_without_a_cache_the_text_is_the_same(context, sampler):
    """Three times the context, so that it is also left; prompts of one token, several, and more than the context."""
    model, prompts = gpt(), [[3], [1, 2, 3, 4, 5], [*range(20)]]
    settings = {"sampler": sampler, "seeds": [5, 6, 7], "context": context}
    texts = rows(model, prompts, 48, **settings)
    assert texts == rows(Uncached(model), prompts, 48, **settings) and [len(text) for text in texts] == [48] * 3
    assert len({*map(tuple, texts)}) == 3


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, prompts = gpt(), [[3], [4, 5, 6, 7, 8], [9, 10], [*range(14)]]
    together = rows(model, prompts, 30, seeds=[1, 2, 3, 4])
    alone = [rows(model, [prompt], 30, seeds=[seed])[0] for prompt, seed in zip(prompts, (1, 2, 3, 4), strict=True)]
    assert together == alone
    assert rows(model, prompts[:1], 10, seeds=[1])[0] == alone[0][:10]  # nor on how many are drawn


def test_steps_are_aligned_at_the_first_token():
    """Row 1 is still being read when row 0 is already continued; each ends after its own three tokens."""
    steps = list(generate(Successor(), [[1], [4, 5, 6]], 3, sampler=GREEDY))
    assert steps == [[2, None], [3, None], [4, 7], [None, 8], [None, 9]]


def test_stop_ends_a_row():
    steps = list(generate(Successor(), [[1], [4]], 5, sampler=GREEDY, stop={3, 6}))
    assert steps == [[2, 5], [3, 6]]


def test_sampled_frequencies_follow_the_softmax():
    """20,000 draws at temperature 2 lie within 4 standard errors of softmax(logits / 2)."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    uniform = 1 - torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = Sampler(2.0)(logits.expand(20_000, 4), uniform).flatten()
    expected = (logits[0] / 2).softmax(-1)
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((draws.bincount(minlength=4) / 20_000 - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_draw_is_the_inverse_of_the_distribution_function(seed):
    """Against a sum over the probabilities, one by one, of a large vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, 5000, generator=generator)
    uniform = 1 - torch.rand(5, 1, generator=generator, dtype=torch.float64)
    drawn = Sampler(0.9)(logits, uniform)
    for p, u, i in zip((logits / 0.9).softmax(-1).double(), uniform, drawn[:, 0].tolist(), strict=True):
        below = float(p[:i].sum() / p.sum())
        assert below - 1e-6 < float(u) <= below + float(p[i] / p.sum()) + 1e-6


@pytest.mark.parametrize("u", [1e-300, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0])
def test_what_is_impossible_is_never_drawn(u):
    """Where the random number is smallest and largest, next to tokens of probability 0."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, -2.0, -torch.inf]])
    assert Sampler()(logits, torch.tensor([[u]], dtype=torch.float64)).item() in (1, 2, 4)


@pytest.mark.parametrize(
    ("sampler", "possible"),
    [
        (Sampler(top_k=2), {1, 2}),
        (Sampler(top_k=9), {0, 1, 2, 3, 4}),
        (Sampler(top_p=0.6), {1}),  # 0.63, 0.23, 0.09, 0.03, 0.01
        (Sampler(top_p=0.7), {1, 2}),
        (Sampler(top_p=0.9), {1, 2, 3}),
        (Sampler(top_p=1.0), {0, 1, 2, 3, 4}),
        (Sampler(top_p=1e-9), {1}),
        (Sampler(min_p=0.3), {1, 2}),  # e^-1 = 0.37
        (Sampler(min_p=0.1), {1, 2, 3}),
        (Sampler(min_p=1.0), {1}),
        (Sampler(temperature=2.0, min_p=0.3), {1, 2, 3}),  # of the distribution at that temperature
        (Sampler(top_k=3, top_p=0.87), {1, 2}),  # of what top_k has left: 0.67, 0.24, 0.09
    ],
)
def test_filters(sampler, possible):
    logits = torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]]).expand(4000, 5)
    uniform = torch.linspace(1 / 4000, 1, 4000, dtype=torch.float64)[:, None]
    assert {*sampler(logits, uniform).flatten().tolist()} == possible


def test_ties_with_the_last_token_kept_are_kept():
    logits, uniform = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(300, 4), torch.linspace(1 / 300, 1, 300)[:, None]
    for sampler in (Sampler(top_k=1), Sampler(top_p=0.1), Sampler(min_p=1.0)):
        assert {*sampler(logits, uniform).flatten().tolist()} == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-38, 1e-46, 5e-324])
def test_tiny_temperature_is_greedy_without_overflow(temperature):
    """In float32 the two smaller ones are 0."""
    assert Sampler(temperature)(torch.tensor([[1.0, 1.5, -torch.inf]]), torch.tensor([[0.9]])).item() == 1


def test_padding_is_never_drawn():
    model = GPT(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8, vocab_multiple=64).eval()
    drawn = rows(model, [[0]] * 50, 20, sampler=Sampler(100.0))
    assert {*itertools.chain(*drawn)} == {0, 1, 2}


def test_weights_that_are_not_finite_are_refused():
    """Else softmax of NaN would draw garbage, or fail deep in torch."""
    model = GPT(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8).eval()
    model.lm_head.weight.data[1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        rows(model, [[0]], 2)


@pytest.mark.parametrize(
    ("prompts", "settings", "text"),
    [
        ([[]], {}, "at least one id"),
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "at least one id"),
        ([[10]], {}, "vocabulary 0..9"),
        ([[1, -1]], {}, "vocabulary 0..9"),
        ([[1]], {"seeds": [1, 2]}, "seeds: 2 for 1 prompts"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1: must be >= 0"),
        ([["1"]], {}, "prompts are sequences of ids"),
        (["abc"], {}, "prompts are sequences of ids"),
        ([[1.5]], {}, "prompts are sequences of ids"),
        ([[1]], {"seeds": [0.5]}, "integers"),
        ([[1]], {"seeds": [2**63]}, "seeds from 0 to"),
        ([[1]], {"max_new_tokens": 2.5}, "integers"),
        ([[1]], {"context": "quarter"}, "context=quarter: must be full or half"),
    ],
)
def test_bad_arguments_are_refused_at_once(prompts, settings, text):
    with pytest.raises(UserError, match=text):
        generate(Successor(), prompts, **{"max_new_tokens": 1, **settings})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be >= 0 and finite"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: must be an integer >= 1"),
        ({"top_k": 2.5}, "top_k=2.5: must be an integer"),
        ({"top_p": 0.0}, "top_p=0.0: must be > 0 and <= 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -0.1}, "min_p=-0.1: must be >= 0 and <= 1"),
    ],
)
def test_bad_samplers_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        Sampler(**settings)


def test_nothing_new_is_nothing():
    assert list(generate(Successor(), [[1], [2, 3]], 0)) == []


def test_tensors_and_arrays_are_prompts_too():
    ids = torch.tensor([[1, 2], [3, 4]])
    assert (
        rows(Successor(), ids, 2, sampler=GREEDY)
        == rows(Successor(), ids.numpy(), 2, sampler=GREEDY)
        == [[3, 4], [5, 6]]
    )


def test_gradients_are_off_only_while_the_model_runs():
    """`generate` is paused at each yield: what the caller does there is its own."""
    for _ in generate(Successor(), [[1]], 2):
        assert torch.is_grad_enabled()


def test_a_compiled_model_runs_as_it_is():
    """Compiling again for each length would take seconds per token. (No backend: nothing is really compiled here.)"""
    counts = []
    model = Uncached(gpt())
    model.compile(backend=lambda module, _: counts.append(1) or module.forward)
    expected = rows(Uncached(model.model), [[1, 2]], 5, sampler=GREEDY)
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    compiled = len(counts)
    assert compiled > 0
    assert rows(model, [[1, 2]], 5, sampler=GREEDY) == expected and len(counts) == compiled
