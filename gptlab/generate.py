"""Sampling from any model that maps token ids (B, T) to logits (B, T, V)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gptlab.errors import UserError


def sample_next(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one id per row from logits (B, V), as (B, 1). Temperature 0 takes the most likely one.

    `top_k` keeps the k most likely tokens (Fan et al. 2018), ties with the last of them included.
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # at most 0: no overflow, however small the temperature
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


def generate(
    model: nn.Module,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue the prompts `idx` (B, T), yielding the next ids (B, 1) as they are drawn.

    The model sees the last `model.block_size` tokens and should be in eval mode. `generator` lives on idx's device.

    Raises:
        UserError: at once, before anything is drawn, for a bad argument; later, for logits that are not finite.
    """
    problems = []
    if idx.dim() != 2 or idx.shape[1] < 1:
        problems.append(f"the prompt must be (B, T) ids with T >= 1, not {tuple(idx.shape)}")
    elif idx.numel() and not 0 <= idx.min() <= idx.max() < model.vocab_size:  # the model does not check it
        problems.append(f"the prompt has ids outside the vocabulary 0..{model.vocab_size - 1}")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens={max_new_tokens} must be >= 0")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature={temperature} must be >= 0 (0: greedy) and finite")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k} must be >= 1, or null for the whole vocabulary")
    if problems:
        raise UserError("; ".join(problems))
    return _generate(model, idx, max_new_tokens, temperature, top_k, generator)


@torch.no_grad()
def _generate(model, idx, max_new_tokens, temperature, top_k, generator) -> Iterator[Tensor]:
    for _ in range(max_new_tokens):
        idx = idx[:, -model.block_size :]
        logits = model(idx)[:, -1, : model.vocab_size]
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or training had diverged")
        next_id = sample_next(logits, temperature, top_k, generator)
        yield next_id
        idx = torch.cat((idx, next_id), dim=1)
