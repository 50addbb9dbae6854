"""What a custom model, data set or tokenizer must offer, tried before training starts."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlab.data.windows import WindowData


@torch.no_grad()
def check_model(model: nn.Module, vocab_size: int, block_size: int) -> None:
    """Whether a user's own model offers what GPTModule's docstring asks for, by trying it on a few tokens.

    Raises:
        ValueError: the text says what is missing or wrong; that it looks ahead would otherwise show as a loss near 0.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model._target_: {name} must be a torch.nn.Module with parameters to train")
    for key, value in (("vocab_size", vocab_size), ("block_size", block_size)):
        if getattr(model, key, None) != value:
            raise ValueError(f"model._target_: {name} must keep its argument {key}={value} as the attribute {key}")
    T = min(block_size, 128)
    ids = torch.arange(2 * T).view(2, T) % vocab_size
    changed = (ids + 1) % vocab_size  # all of the second sequence, but of the first
    changed[0, :-1] = ids[0, :-1]  # the last token alone
    was_training = model.training
    logits, others = model.eval()(ids), model(changed)
    model.train(was_training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if (
        not isinstance(logits, Tensor)
        or logits.dim() != 3
        or logits.shape[:2] != ids.shape
        or logits.shape[2] < vocab_size
    ):
        raise ValueError(
            f"model._target_: {name} must map ids (B, T) to logits (B, T, V) with V >= vocab_size: for ids (2, {T}) and "
            f"vocab_size={vocab_size} it returned {shape}"
        )
    if not torch.isfinite(logits[..., :vocab_size]).all():
        raise ValueError(f"model._target_: {name} returns logits that are not finite, before any training")
    if not torch.allclose(logits[0, :-1, :vocab_size], others[0, :-1, :vocab_size], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"model._target_: {name} looks ahead: its logits for a position change with later tokens, which it is to "
            "predict, or with other sequences; mask them, as is_causal=True does in scaled_dot_product_attention"
        )


def check_data(data: Any) -> None:
    """Whether a user's own data set offers what WindowData's docstring asks for; its tokenizer has a check of its own.

    Raises:
        ValueError: the text says what is missing or wrong.
    """
    name = f"data._target_: {type(data).__name__}"
    needed = ("tokenizer", "record", "resolved", "warning", "block_size", "batch_size", "micro_batch_size")
    if missing := [part for part in needed if not hasattr(data, part)]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; all that is needed is in the docstring of WindowData")
    if isinstance(data, WindowData) and not data.checked:
        data.check_lengths(f"data={data.name}")
    try:
        json.dumps(data.record)
    except TypeError as error:
        raise ValueError(f"{name}: record must hold plain values: {error}") from None
    if not {"name", "sha256"} <= data.record.keys():
        raise ValueError(f"{name}: record must have name and sha256, and has {', '.join(data.record)}")


def check_tokenizer(tokenizer: Any, build: Callable[[dict], Any]) -> None:
    """Whether a user's own tokenizer offers what WindowData's docstring asks for; `build` makes it from its state.

    Raises:
        ValueError: the text says what is missing or wrong.
    """
    name = f"data._target_: its tokenizer {type(tokenizer).__name__}"
    needed = ("vocab_size", "encode", "decode", "token_bytes", "start", "state")
    if missing := [part for part in needed if not hasattr(tokenizer, part)]:
        raise ValueError(f"{name} lacks {', '.join(missing)}; all that is needed is in the docstring of WindowData")
    ids, sizes = tokenizer.encode(tokenizer.start), tokenizer.token_bytes()
    if not (isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids)):
        raise ValueError(f"{name}: encode(start) must be a numpy array of at least one integer, not {ids!r}")
    if not isinstance(tokenizer.decode(ids.tolist()), str):
        raise ValueError(f"{name}: decode(ids) must be a str")
    if not (isinstance(sizes, np.ndarray) and sizes.shape == (tokenizer.vocab_size,) and sizes.dtype.kind in "iu"):
        raise ValueError(f"{name}: token_bytes() must be a numpy array of {tokenizer.vocab_size} integers")
    try:
        json.dumps(tokenizer.state())
    except TypeError as error:
        raise ValueError(f"{name}: state() must hold plain values: {error}") from None
    again = build(tokenizer.state())
    if again.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"{name} has {tokenizer.vocab_size} tokens, and {again.vocab_size} when made from its state()")
