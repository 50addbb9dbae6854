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
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no overflow, however small that is
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)


@torch.no_grad()
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
        UserError: the prompt is empty or has ids outside the vocabulary, or the logits are not finite.
    """
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise UserError(f"the prompt must be (B, T) ids with T >= 1, not {tuple(idx.shape)}")
    if idx.numel() and not 0 <= idx.min() <= idx.max() < model.vocab_size:  # the model does not check it
        raise UserError(f"the prompt has ids outside the vocabulary 0..{model.vocab_size - 1}")
    for _ in range(max_new_tokens):
        idx = idx[:, -model.block_size :]
        logits = model(idx)[:, -1, : model.vocab_size]
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its weights are damaged, or training had diverged")
        next_id = sample_next(logits, temperature, top_k, generator)
        yield next_id
        idx = torch.cat((idx, next_id), dim=1)
