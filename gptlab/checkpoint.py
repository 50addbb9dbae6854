"""From a checkpoint file to a model that can be used. The file is treated as hostile: only plain values and tensors
are read from it, nothing in it is interpolated, and classes that gptlab does not define are built only on request."""

import dataclasses
import importlib
import inspect
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlab.config import GPTConfig
from gptlab.tokenizer import from_state

LARGEST_WEIGHT = 1e6  # real ones are below 1e3; a product of larger ones may overflow


def load(path: Path, device: str | torch.device = "cpu", *, trust: bool = False) -> tuple[nn.Module, Any, dict]:
    """The model in eval mode on `device`, its tokenizer, and the run's config.

    A model or tokenizer of a user's own is code from outside: `trust` allows importing it, and what it raises is
    raised here.

    Raises:
        ValueError: not a checkpoint of gptlab, damaged, or of a class of somebody else's without `trust`.
    """
    checkpoint = read(path)
    config, state = checkpoint["config"], checkpoint["tokenizer"]
    try:
        foreign = foreign_classes(config["model"], state)
    except ValueError as error:
        raise damaged(path, error) from None
    if foreign and not trust:
        raise ValueError(
            f"{path} needs {' and '.join(foreign)}, which is not gptlab's: building it runs that code. If you "
            "trust the code and whoever wrote the file, add trust=true"
        )
    prefix = "model."
    try:
        state_dict = checkpoint["state_dict"].items()
        weights = {name.removeprefix(prefix): tensor for name, tensor in state_dict if name.startswith(prefix)}
        tokenizer = build_tokenizer(state)
        if config["model"].get("_target_") == GPTConfig._target_:
            check_sizes(config, tokenizer.vocab_size, weights, path.stat().st_size)
        model = build_model(config["model"], tokenizer.vocab_size, config["data"]["block_size"])
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if foreign:
            raise
        raise damaged(path, error) from None
    limit = math.inf if foreign else LARGEST_WEIGHT
    if not all((parameter.abs() < limit).all() for parameter in model.parameters()):
        raise ValueError(
            f"{path}: its weights are not finite, or huge; the run had diverged. Try an earlier checkpoint"
        )
    return model.to(device).eval(), tokenizer, config


def foreign_classes(model_config: dict[str, Any], tokenizer_state: dict[str, Any]) -> list[str]:
    """The classes that a model and its tokenizer are built from and that are not gptlab's."""
    model, tokenizer = model_config.get("_target_"), tokenizer_state.get("_target_")
    targets = [target for target in (model, tokenizer) if target not in (None, GPTConfig._target_)]
    if not all(isinstance(target, str) for target in targets):
        raise ValueError("a _target_ must be the name of a class")
    return targets


def check_sizes(config: dict[str, Any], vocab_size: int, weights: dict[str, Any], file_size: int) -> None:
    """Whether the config of a GPT fits the weights that come with it, before memory is taken for what it says.

    Raises:
        ValueError: it does not.
    """
    for field in dataclasses.fields(GPTConfig):
        value = config["model"].get(field.name, field.default)
        if type(value) is not field.type and not (field.type is float and type(value) is int):
            raise ValueError(f"model.{field.name} is no {field.type.__name__}")
    if type(config["data"]["block_size"]) is not int or config["model"]["n_layer"] > len(weights):
        raise ValueError("data.block_size or model.n_layer does not fit the weights")
    with torch.device("meta"):  # shapes alone
        expected = build_model(config["model"], vocab_size, config["data"]["block_size"]).state_dict()
    if {name: tensor.shape for name, tensor in expected.items()} != {name: w.shape for name, w in weights.items()}:
        raise ValueError("the shapes of the weights are not those of the model that its config describes")
    if sum(tensor.nbytes for tensor in expected.values()) > 2 * file_size:  # tied ones are there twice
        raise ValueError("the weights take more room than the whole file")


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; with `mmap`, tensors are read only once they are looked at.

    Raises:
        ValueError: not a checkpoint of gptlab, or damaged.
        FileNotFoundError: it may not be read, whatever it is.
    """
    try:
        check_bytes(path, whole=not mmap)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not all(isinstance(checkpoint[key], dict) for key in ("config", "state_dict", "tokenizer", "data")):
            raise TypeError("it lacks what gptlab puts into one")
        if not all(isinstance(checkpoint["config"][key], dict) for key in ("model", "data")):
            raise TypeError("its config lacks what gptlab puts into one")
    except PermissionError as error:
        raise FileNotFoundError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # torch's reader fails in many ways, and all of them are about the file
        raise damaged(path, error) from None
    return checkpoint


def check_bytes(path: Path, *, whole: bool) -> None:
    """What torch does not look at itself: that nothing unpacks to more than the file, and, of the `whole` file, the
    checksums that torch wrote with it.

    Raises:
        ValueError, zipfile.BadZipFile: it is damaged.
    """
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("torch compresses nothing")
        if whole and (part := file.testzip()) is not None:
            raise ValueError(f"{part} has another checksum")


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
    sizes = {"vocab_size": vocab_size, "block_size": block_size}
    model = _build("model", config["_target_"], {**sizes, **arguments})
    for name, size in sizes.items():  # what `generate` needs; a custom model need not keep them
        if not hasattr(model, name):
            setattr(model, name, size)
    return model


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
