"""Sampling from any model that maps token ids (B, T) to logits (B, T, V).

Rows are aligned at their first token: while a longer prompt is still read, shorter ones are already continued. So prompts
of different lengths need neither padding nor masks.

    row 0   T o   b e | o r   n o t           given | drawn
    row 1   W h e n   t h e | s u n
            \\_ prefill _/ one position a step ->
"""

import contextlib
import math
import operator
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptlab.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """How an id is drawn from logits. The filters apply in this order, each to what the ones before it left; ties with
    the last token that a filter keeps are kept.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 1.0  # 0: always the most likely token
    top_k: int | None = None  # the k most likely tokens (Fan et al. 2018)
    top_p: float | None = None  # the fewest whose probabilities reach top_p (nucleus; Holtzman et al. 2020)
    min_p: float | None = None  # those at least min_p times as likely as the likeliest (Nguyen et al. 2024)

    def __post_init__(self) -> None:
        for name, allowed, is_valid in (
            ("temperature", ">= 0 and finite", 0 <= self.temperature < math.inf),
            ("top_k", "an integer >= 1", self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1)),
            ("top_p", "> 0 and <= 1", self.top_p is None or 0 < self.top_p <= 1),
            ("min_p", ">= 0 and <= 1", self.min_p is None or 0 <= self.min_p <= 1),
        ):
            if not is_valid:
                raise UserError(f"{name}={getattr(self, name)}: must be {allowed}")

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One id per row of logits (B, V), as (B, 1): the inverse of the distribution function at `uniform` (B, 1) in (0, 1].
        One random number a row, where torch.multinomial draws one per token."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float()
        temperature = max(self.temperature, torch.finfo(torch.float32).tiny)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no overflow
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = _drop_below(logits, logits.topk(self.top_k, dim=-1).values[:, -1:])
        if self.top_p is not None and self.top_p < 1:
            ordered = logits.sort(dim=-1, descending=True).values
            p = ordered.softmax(dim=-1)
            superfluous = p.cumsum(dim=-1) - p >= self.top_p  # those before it suffice
            logits = _drop_below(logits, ordered.masked_fill(superfluous, math.inf).amin(dim=-1, keepdim=True))
        if self.min_p:
            logits = _drop_below(logits, logits.new_tensor(math.log(self.min_p)))
        exact = torch.float32 if logits.device.type == "mps" else torch.float64  # which MPS lacks
        sums = logits.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
        return torch.searchsorted(sums, uniform.to(sums) * sums[:, -1:])  # never a token of probability 0


def _drop_below(logits: Tensor, least: Tensor) -> Tensor:
    return logits.masked_fill(logits < least, -math.inf)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampler: Sampler = Sampler(),
    seeds: Sequence[int] | None = None,
    stop: Collection[int] = (),
    context: str = "full",
) -> Iterator[list[int | None]]:
    """Continue each prompt; yields, per step, the next id of each row: None while its prompt is still being read, and after
    it has ended.

    A row depends on its prompt and its seed alone, not on the rows beside it (up to the rounding of matrix products,
    which may differ between batch sizes). The model should be in eval mode; one with `new_cache`, such as GPT, computes
    each position once.

    Args:
        seeds: one per row; default 0, 1, 2, ...
        stop: ids that end a row; the id itself is yielded.
        context: what the model sees once a row is longer than model.block_size. "full": the last block_size tokens. As
            each of them has a new position then, nothing cached can be used. "half": the last half of them, to which
            new tokens are added until the block is full again: several times faster, and another text.

    Raises:
        UserError: an empty prompt, ids outside the vocabulary, another argument that is not allowed, or logits that are
            not finite.
    """
    try:
        rows = [[operator.index(i) for i in prompt][-model.block_size :] for prompt in prompts]
        max_new_tokens = operator.index(max_new_tokens)
        seeds = range(len(rows)) if seeds is None else [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise UserError(f"prompts are sequences of ids, seeds and max_new_tokens integers: {error}") from None
    if not rows or not all(rows):
        raise UserError("there must be at least one prompt, and each must have at least one id")
    if not all(0 <= i < model.vocab_size for row in rows for i in row):  # the model does not check it
        raise UserError(f"the prompt has ids outside the vocabulary 0..{model.vocab_size - 1}")
    if len(seeds) != len(rows):
        raise UserError(f"seeds: {len(seeds)} for {len(rows)} prompts; give one per prompt")
    if max_new_tokens < 0 or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"max_new_tokens={max_new_tokens}: must be >= 0, and seeds from 0 to 2**63 - 1")
    if context not in ("full", "half"):
        raise UserError(f"context={context}: must be full or half")
    return _generate(model, rows, max_new_tokens, sampler, seeds, frozenset(stop), context)


@torch.no_grad()  # not inference_mode: what a custom model caches may be trained with
def _generate(
    model: nn.Module,
    rows: list[list[int]],
    max_new_tokens: int,
    sampler: Sampler,
    seeds: Sequence[int],
    stop: Collection[int],
    context: str,
) -> Iterator[list[int | None]]:
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    ids = torch.tensor([row[: min(lengths)] for row in rows], device=device)  # (B, T), grows
    given = torch.full((len(rows), max(lengths)), -1)
    for row, prompt in zip(given, rows, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    given = given.to(device)
    # On the CPU, one number per new token: a seed means the same on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniform = torch.ones(len(rows), 1, dtype=torch.float64)
    positions = _Positions(model, context, max(lengths) + max_new_tokens)
    running = [max_new_tokens > 0] * len(rows)
    for T in range(min(lengths), max(lengths) + max_new_tokens):
        if not any(running):
            return
        with _eagerly():
            logits = positions.logits_after(ids)[..., : model.vocab_size]  # (B, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or training had diverged")
        drawing = [going and length <= T for going, length in zip(running, lengths, strict=True)]
        for row, generator, draws in zip(uniform, generators, drawing, strict=True):
            if draws and sampler.temperature > 0:
                row[0] = 1 - torch.rand((), generator=generator, dtype=torch.float64)
        new = sampler(logits, uniform)
        if max(lengths) > T:
            new = torch.where(given[:, T : T + 1] < 0, new, given[:, T : T + 1])
        ids = torch.cat((ids, new), dim=1)
        values = new[:, 0].tolist()
        yield [value if draws else None for value, draws in zip(values, drawing, strict=True)]
        for i, value in enumerate(values):
            running[i] &= lengths[i] + max_new_tokens > T + 1 and not (drawing[i] and value in stop)


class _Positions:
    """Which positions the model computes: all that it sees, or with a cache those that are new."""

    def __init__(self, model: nn.Module, context: str, length: int) -> None:
        self.model, self.context, self.length, self.cache = model, context, length, None
        self.has_cache = hasattr(model, "new_cache")
        self.start = 0  # of what the model sees, in the whole sequence

    def logits_after(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows ids (B, T)."""
        B, T = ids.shape
        if T - self.start > self.model.block_size:  # learned positions: each token gets a new one
            self.start = T - (self.model.block_size if self.context == "full" else max(1, self.model.block_size // 2))
            self.cache = None
        if not self.has_cache:
            return self.model(ids[:, self.start :])[:, -1]
        if self.cache is not None:
            return self.model(ids[:, -1:], self.cache)[:, -1]
        self.cache = self.model.new_cache(B, self.length)
        return self.model(ids[:, self.start :], self.cache)[:, -1]


def _eagerly() -> contextlib.AbstractContextManager:
    """A compiled model would be compiled again for each length. (Where nothing is compiled, dynamo is not imported.)"""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
