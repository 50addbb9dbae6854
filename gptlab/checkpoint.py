"""From a checkpoint file to a model that can be used. The file is treated as hostile: only plain values and tensors
are read from it, nothing in it is interpolated, and classes that gptlab does not define are built only on request."""

import pickle
import pkgutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlab.config import GPTConfig
from gptlab.model import GPT
from gptlab.tokenizer import from_state


def load(path: Path, device: str | torch.device = "cpu", *, trust: bool = False) -> tuple[nn.Module, Any, dict]:
    """The model in eval mode on `device`, its tokenizer, and the run's config.

    A model or tokenizer of a user's own is code from outside: `trust` allows importing it.

    Raises:
        ValueError: not a checkpoint of gptlab, damaged, or of a class of somebody else's without `trust`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, weights, tokenizer_state = (checkpoint[key] for key in ("config", "state_dict", "tokenizer"))
        arguments = {key: value for key, value in config["model"].items() if key != "compile"}
        target = arguments.pop("_target_")
        model_class = GPT if target == GPTConfig._target_ else _foreign(target, path, trust)
        if isinstance(tokenizer_state, dict) and "_target_" in tokenizer_state:
            state = dict(tokenizer_state)
            tokenizer = _foreign(state.pop("_target_"), path, trust)(**state)
        else:
            tokenizer = from_state(tokenizer_state)
        model = model_class(vocab_size=tokenizer.vocab_size, block_size=config["data"]["block_size"], **arguments)
        prefix = "model."
        model.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    except Untrusted:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = (
            "no plain values and tensors" if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0]
        )
        raise ValueError(
            f"{path} is not a checkpoint of gptlab, or it is damaged ({type(error).__name__}: {reason})"
        ) from None
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise ValueError(f"{path}: its weights are not finite; the run had diverged. Try an earlier checkpoint")
    return model.to(device).eval(), tokenizer, config


class Untrusted(ValueError):
    """A checkpoint that needs code from outside, which was not allowed or is not there."""


def _foreign(target: Any, path: Path, trust: bool) -> Any:
    if not trust:
        raise Untrusted(
            f"{path} needs the class {target}, which is not gptlab's: building it runs that code. If you trust "
            "the code and whoever wrote the file, add trust=true"
        )
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise Untrusted(
            f"{path} needs the class {target}, which cannot be imported ({error}): run this in the folder that holds "
            "its package, or install that"
        ) from None
