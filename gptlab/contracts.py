"""What a custom model, data set or tokenizer must offer, tried before training starts.

A model is a `torch.nn.Module` whose constructor takes the keywords `vocab_size` and `block_size` (from the data) and the
keys of its config. It maps token ids (B, T) int64, 1 <= T <= block_size, to logits (B, T, V), V >= vocab_size, for the
token after each position, computed from the tokens up to that position alone. It keeps tensors in itself (buffers), not
in globals or a `functools.cache`: the memory estimate runs it on tensors without data, which would stay there. With a
method `flops_per_token()` (forward and backward), train/mfu is logged. Data sets and tokenizers are described in
`gptlab.data.windows.WindowData`.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlab.data.windows import WindowData
from gptlab.errors import UserError

DATA = ("tokenizer", "record", "resolved", "block_size", "batch_size", "micro_batch_size")
TOKENIZER = ("vocab_size", "encode", "decode", "token_bytes", "start", "state")


@torch.no_grad()
def check_model(model: nn.Module, vocab_size: int, block_size: int) -> None:
    """Raises UserError unless the model keeps the contract above, as far as a few tokens can tell. A model that looks
    ahead would otherwise train to a loss near 0."""
    name = f"model._target_: {type(model).__name__}"
    require(isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters()),
            f"{name} must be a torch.nn.Module with parameters to train")  # fmt: skip
    for key, value in (("vocab_size", vocab_size), ("block_size", block_size)):
        require(getattr(model, key) == value, f"{name}.{key}={getattr(model, key)} must be {value}, as it was given")
    T = min(block_size, 128)
    ids = torch.arange(2 * T).view(2, T) % vocab_size
    was_training = model.training
    logits = model.eval()(ids)
    again, prefix = model(ids), model(ids[:1, : (T + 1) // 2])
    model.train(was_training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    require(shape[:2] == (2, T) and len(shape) == 3 and shape[2] >= vocab_size,
            f"{name} must map ids (B, T) to logits (B, T, V) with V >= vocab_size; for ids (2, {T}) and vocab_size={vocab_size} "
            f"it returned {shape or type(logits).__name__}")  # fmt: skip
    require(logits[..., :vocab_size].isfinite().all(), f"{name} returns logits that are not finite before any training")
    close = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": True}
    require(torch.allclose(logits, again, **close),
            f"{name} is random in eval mode; F.dropout needs training=self.training")  # fmt: skip
    require(torch.allclose(logits[:1, : prefix.shape[1]], prefix, **close),
            f"{name} looks ahead: logits change with later tokens, the ones to predict, or with other sequences; mask them, "
            "as is_causal=True does in scaled_dot_product_attention")  # fmt: skip


def check_data(data: Any) -> None:
    """Raises UserError unless a data set offers what WindowData's docstring lists; see also `check_tokenizer`."""
    name = f"data._target_: {type(data).__name__}"
    require_attributes(name, data, DATA)
    if isinstance(data, WindowData) and not data.checked:
        data.check_lengths(f"data={data.name}")
    require_json(f"{name}.record", data.record)
    require(
        {"name", "sha256"} <= data.record.keys(), f"{name}.record must have name and sha256; it has {[*data.record]}"
    )


def check_tokenizer(tokenizer: Any, build: Callable[[dict], Any]) -> None:
    """Raises UserError unless a tokenizer offers what WindowData's docstring lists; `build` restores it from its state."""
    name = f"data._target_: its tokenizer {type(tokenizer).__name__}"
    require_attributes(name, tokenizer, TOKENIZER)
    ids, sizes = tokenizer.encode(tokenizer.start), tokenizer.token_bytes()
    require(isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu" and len(ids),
            f"{name}: encode(start) must return a 1-D numpy array of at least one integer, not {ids!r}")  # fmt: skip
    require(isinstance(tokenizer.decode(ids.tolist()), str), f"{name}: decode(ids) must return a str")
    require(isinstance(sizes, np.ndarray) and sizes.shape == (tokenizer.vocab_size,) and sizes.dtype.kind in "iu",
            f"{name}: token_bytes() must return a numpy array of {tokenizer.vocab_size} integers")  # fmt: skip
    require_json(f"{name}: state()", tokenizer.state())
    restored = build(tokenizer.state()).vocab_size
    require(restored == tokenizer.vocab_size,
            f"{name}: vocab_size={tokenizer.vocab_size}, but {restored} when restored from its state()")  # fmt: skip


def require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


def require_attributes(name: str, value: Any, attributes: tuple[str, ...]) -> None:
    missing = ", ".join(attribute for attribute in attributes if not hasattr(value, attribute))
    require(not missing, f"{name} lacks {missing}; the docstring of gptlab.data.windows.WindowData lists them all")


def require_json(name: str, value: Any) -> None:
    try:
        json.dumps(value)
    except TypeError as error:
        raise UserError(f"{name} must hold plain JSON values: {error}") from None
