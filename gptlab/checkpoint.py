"""From a checkpoint file to a model that can be used. The file is treated as hostile: only plain values and tensors
are read from it, nothing in it is interpolated, and classes that gptlab does not define are built only on request."""

import importlib
import inspect
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlab.config import GPTConfig
from gptlab.tokenizer import from_state


def load(path: Path, device: str | torch.device = "cpu", *, trust: bool = False) -> tuple[nn.Module, Any, dict]:
    """The model in eval mode on `device`, its tokenizer, and the run's config.

    A model or tokenizer of a user's own is code from outside: `trust` allows importing it, and what it raises is
    raised here.

    Raises:
        ValueError: not a checkpoint of gptlab, damaged, or of a class of somebody else's without `trust`.
    """
    checkpoint = read(path)
    config, state = checkpoint["config"], checkpoint["tokenizer"]
    foreign = foreign_classes(config["model"], state)
    if foreign and not trust:
        raise ValueError(
            f"{path} needs {' and '.join(foreign)}, which is not gptlab's: building it runs that code. If you "
            "trust the code and whoever wrote the file, add trust=true"
        )
    prefix = "model."
    weights = {name.removeprefix(prefix): w for name, w in checkpoint["state_dict"].items() if name.startswith(prefix)}
    try:
        tokenizer = build_tokenizer(state)
        model = build_model(config["model"], tokenizer.vocab_size, config["data"]["block_size"])
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if foreign:
            raise
        raise damaged(path, error) from None
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise ValueError(f"{path}: its weights are not finite; the run had diverged. Try an earlier checkpoint")
    return model.to(device).eval(), tokenizer, config


def foreign_classes(model_config: dict[str, Any], tokenizer_state: dict[str, Any]) -> list[str]:
    """The classes that a model and its tokenizer are built from and that are not gptlab's."""
    model, tokenizer = model_config.get("_target_"), tokenizer_state.get("_target_")
    return [str(target) for target in (model, tokenizer) if target not in (None, GPTConfig._target_)]


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; with `mmap`, tensors are read only once they are looked at.

    Raises:
        ValueError: not a checkpoint of gptlab, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not all(isinstance(checkpoint[key], dict) for key in ("config", "state_dict", "tokenizer", "data")):
            raise TypeError("it lacks what gptlab puts into one")
        if not all(isinstance(checkpoint["config"][key], dict) for key in ("model", "data")):
            raise TypeError("its config lacks what gptlab puts into one")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from None
    return checkpoint


def damaged(path: Path, error: Exception) -> ValueError:
    plain = not isinstance(error, pickle.UnpicklingError)
    reason = str(error).split("\n")[0] if plain else "no plain values and tensors"
    return ValueError(f"{path} is not a checkpoint of gptlab, or it is damaged ({type(error).__name__}: {reason})")


def build_model(config: dict[str, Any], vocab_size: int, block_size: int) -> nn.Module:
    """The model that a config's node `model` describes: its class, called with its keys as plain values.

    Raises:
        ValueError: there is no such class, or it does not take these keys.
    """
    arguments = {key: value for key, value in config.items() if key not in ("_target_", "compile")}
    return _build("model", config["_target_"], {"vocab_size": vocab_size, "block_size": block_size, **arguments})


def build_tokenizer(state: dict[str, Any]) -> Any:
    """The tokenizer whose `state()` this is.

    Raises:
        ValueError: a state that no tokenizer of ours wrote, or of a class that is not there.
    """
    if "_target_" not in state:
        return from_state(state)
    return _build("tokenizer", state["_target_"], {key: value for key, value in state.items() if key != "_target_"})


def _build(key: str, target: str, arguments: dict[str, Any]) -> Any:
    try:
        module, _, name = target.rpartition(".")
        wanted = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{key}._target_={target} cannot be imported ({error}): it must lie in the working directory, or "
            "be installed"
        ) from error
    try:
        inspect.signature(wanted).bind(**arguments)
    except TypeError as error:
        taken = ", ".join(inspect.signature(wanted).parameters)
        raise ValueError(f"{key}: {target} does not fit its keys: {error}; it takes {taken}") from None
    return wanted(**arguments)
