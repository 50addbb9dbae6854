"""Checkpoint files, which are untrusted: only plain values and tensors are read from them, nothing in them is interpolated,
and classes that gptlab does not define are built only with `trust`."""

import inspect
import math
import pickle
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlab.errors import UserError
from gptlab.pretrained import shapes_of
from gptlab.targets import build, foreign_targets, require_trust
from gptlab.tokenizer import from_state

GPT_TARGET = "gptlab.model.GPT"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how files began before torch wrote zip archives
MOST_POSITIONS = 2**20  # rotary ones have no weights that would show that a context is too long
PLACES = ("path", "val_path", "folder")  # keys of `data` that name files of this machine


class DamagedError(UserError):
    """Not a checkpoint of gptlab, or damaged."""

    def __init__(self, path: Path, error: Exception) -> None:
        unpickling = isinstance(error, pickle.UnpicklingError)  # torch's text would advise to trust the file
        reason = "not just plain values and tensors" if unpickling else str(error).split("\n")[0]
        kind = (
            "not a file of torch.save"
            if isinstance(error, zipfile.BadZipFile)
            else f"{type(error).__name__}: {reason[:500]}"
        )
        super().__init__(
            f"{path} is damaged, or not a checkpoint of gptlab ({kind}); give a run folder or a .ckpt file"
        )


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config for a checkpoint: without paths, as it may travel."""
    data = {key: None if key in PLACES else value for key, value in config["data"].items()}
    return {**config, "data": data, "init_from": config["init_from"] and Path(config["init_from"]).name, "meta": None}


def unpack(
    path: Path, checkpoint: dict[str, Any], *, trust: bool
) -> tuple[dict[str, Any], Any, dict[str, torch.Tensor]]:
    """The run's config, its tokenizer, and the model's weights, of which memory is allocated for nothing yet. `trust` allows
    importing a custom model or tokenizer, whose exceptions are passed on.

    Raises:
        UserError: damaged, or of a foreign class without `trust`.
    """
    config, state = checkpoint["config"], checkpoint["tokenizer"]
    foreign = [*foreign_targets(config["model"], {GPT_TARGET}), *foreign_targets(state, ())]
    require_trust(path, foreign, trust)
    try:
        named = [(name, weight) for name, weight in checkpoint["state_dict"].items() if name.startswith("model.")]
        weights = {name.removeprefix("model."): weight for name, weight in named}
        tokenizer = build_tokenizer(state)
        if "_target_" not in config["model"] or "block_size" not in config["data"]:
            raise ValueError("it does not say which model it is, or its block_size")
        if config["model"].get("_target_") == GPT_TARGET:
            check_sizes(config, tokenizer.vocab_size, weights, path.stat().st_size)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if foreign:
            raise
        raise DamagedError(path, error) from None
    return config, tokenizer, weights


def check_sizes(config: dict[str, Any], vocab_size: int, weights: dict[str, Any], file_size: int) -> None:
    """Raise ValueError if the config of a GPT does not fit its weights, before memory is allocated for what it says."""
    from gptlab.model import GPT

    model = {"bias": False, "vocab_multiple": 1, "ngrams": [], "ngram_rows": 1, **config["model"]}
    for name, parameter in inspect.signature(GPT).parameters.items():
        types = {float: (int, float), Sequence[int]: (list,)}.get(parameter.annotation, (parameter.annotation,))
        if name in model and type(model[name]) not in types:
            raise ValueError(f"model.{name} must be of type {types[-1].__name__}")
    if not all(type(n) is int and 2 <= n <= 8 for n in model["ngrams"]):
        raise ValueError("model.ngrams must be sizes from 2 to 8")
    if min(model["vocab_multiple"], model["ngram_rows"]) < 1:
        raise ValueError("model.vocab_multiple and model.ngram_rows must be >= 1")
    block_size, n_layer = config["data"]["block_size"], model["n_layer"]
    if type(block_size) is not int or not (1 <= block_size <= MOST_POSITIONS and 1 <= n_layer <= len(weights)):
        raise ValueError("data.block_size or model.n_layer does not fit the weights")
    shapes = shapes_of(model, vocab_size, block_size)
    if {name: tuple(w.shape) for name, w in weights.items()} != shapes:
        raise ValueError("the weights do not have the shapes that the config describes")
    if 4 * sum(map(math.prod, shapes.values())) > 2 * file_size:  # tied weights count twice
        raise ValueError("the weights are larger than the whole file")


def read(path: Path, *, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of gptlab's, on the CPU; with `mmap`, tensors are read when they are used.

    Raises:
        DamagedError: not a checkpoint of gptlab, or damaged.
        UserError: no permission to read it.
    """
    return checked(path, read_file(path, mmap=mmap))


def checked(path: Path, checkpoint: Any) -> dict[str, Any]:
    """The content of a file, if it is that of a checkpoint of gptlab's; else raises DamagedError."""
    try:
        parts = [checkpoint[key] for key in ("config", "state_dict", "tokenizer", "data")]
        if not all(isinstance(part, dict) for part in (*parts, *(parts[0][key] for key in ("model", "data")))):
            raise TypeError("a part of it is not a dict")
    except Exception as error:
        raise DamagedError(path, error) from None
    return checkpoint


def read_file(path: Path, *, mmap: bool = False) -> Any:
    """The plain values and tensors in a file of torch.save's; raises as `read`."""
    try:
        with open(path, "rb") as file:
            if file.read(len(LEGACY)) == LEGACY:
                code = f"import torch; torch.save(torch.load({str(path)!r}, weights_only=True), {str(path) + '.new'!r})"
                command = shlex.join(["python", "-c", code])
                raise UserError(f"{path} is in the format of torch < 1.6; save it again: {command}")
        check_bytes(path, whole=not mmap)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch's reader fails in many ways, and all of them are about the file
        raise DamagedError(path, error) from None


def check_bytes(path: Path, *, whole: bool) -> None:
    """What torch does not check: that nothing unpacks to more than the file, and, for the `whole` file, its checksums."""
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("compressed, as torch never does")
        if whole and (part := file.testzip()) is not None:
            raise ValueError(f"wrong checksum of {part}")


def build_model(config: dict[str, Any], vocab_size: int, block_size: int) -> nn.Module:
    """The model of a config's node `model`; raises UserError if there is no such class, or it does not take these keys."""
    arguments = {key: value for key, value in config.items() if key not in ("_target_", "compile")}
    sizes = {"vocab_size": vocab_size, "block_size": block_size}
    model = build("model", config["_target_"], {**sizes, **arguments})
    for name, size in sizes.items():  # what `generate` needs; a custom model need not keep them
        if not hasattr(model, name):
            setattr(model, name, size)
    return model


def build_tokenizer(state: dict[str, Any]) -> Any:
    """The tokenizer whose `state()` this is; raises ValueError if no tokenizer writes such a state."""
    if "_target_" not in state:
        return from_state(state)
    return build("tokenizer", state["_target_"], {key: value for key, value in state.items() if key != "_target_"})
