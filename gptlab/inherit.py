"""What a config takes from weights that exist: their sizes and tokenizer (train init_from=...), a run's own data (evaluate)."""

import os
from collections.abc import Collection
from typing import Any

from gptlab import config, targets
from gptlab.errors import UserError

TEXT = "gptlab.data.text.TextData"


def choose(ckpt: Any, init_from: Any) -> str:
    """The one of them that is given; raises UserError unless exactly one is."""
    if ckpt is not None and init_from is not None:
        raise UserError("ckpt and init_from exclude each other; give one of them")
    if ckpt is None and init_from is None:
        raise UserError(
            "ckpt is missing; give a run folder, a checkpoint file, or latest: ckpt=outputs/NAME/DATE; or pretrained weights: "
            "init_from=gpt2, gpt2-medium, gpt2-large, gpt2-xl or FOLDER"
        )
    return str(ckpt if init_from is None else init_from)


def train_config(values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The config of a run that starts from the weights `init_from`, which decide most of `model`, and the tokenizer.

    Args:
        keys: given on the command line.

    Raises:
        UserError: these contradict the weights, or there are none.
    """
    from gptlab import sources

    if not values["init_from"]:
        raise UserError("init_from= is empty; name weights, or leave it out")
    name = sources.locate(values["init_from"])
    meta = values["meta"] and os.path.abspath(os.path.expanduser(str(values["meta"])))
    filled, block_size = sources.architecture(name, meta)
    targets.require_trust(name, config.foreign_parts({"model": filled}), values["trust"] is True)
    if refused := [key for key in keys if key.startswith("model.") and key.removeprefix("model.") in filled]:
        free = ", ".join(f"model.{key}" for key in sources.OWN if key in values["model"])
        raise UserError(f"{', '.join(refused)}: decided by init_from={name}; leave out ({free} can be set)")
    model = values["model"]
    if "model" in keys and (wrong := [key for key in filled if model.get(key) != filled[key]]):
        has = ", ".join(f"model.{key}={filled[key]}" for key in wrong)
        raise UserError(f"model: init_from={name} has {has}; leave model=NAME out")
    model = {**model, **filled} if model.get("_target_") == filled["_target_"] else filled
    data = values["data"]
    if "data.block_size" not in keys and isinstance(data.get("block_size"), int) and isinstance(block_size, int):
        data = {**data, "block_size": min(data["block_size"], block_size)}
    values = {**values, "init_from": name, "meta": meta, "model": model, "data": data}
    return with_tokenizer(values, keys, block_size, f"init_from={name}")


def with_tokenizer(values: dict[str, Any], keys: Collection[str], block_size: Any, source: str) -> dict[str, Any]:
    """The config with data for weights of that context length: a text is encoded with the weights' tokenizer."""
    data = values["data"]
    if isinstance(data.get("block_size"), int) and isinstance(block_size, int) and data["block_size"] > block_size:
        raise UserError(
            f"data.block_size={data['block_size']} must be <= {block_size}, the positions of {source}; use "
            f"data.block_size={block_size}"
        )
    if data.get("_target_") == TEXT and not {"data.tokenizer", "data.vocab_size"} & {*keys}:
        data = {**data, "tokenizer": "init_from", "vocab_size": None}
    return {**values, "data": data}


def evaluation_config(values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The config of an evaluation: on the data that the model was trained on, with what the command line changes, or on a
    chosen data set with the model's context length. Raises UserError if there are none."""
    name = choose(values["ckpt"], values["init_from"])
    from gptlab import sources

    _, block_size = sources.architecture(name)
    data = values.get("data") or {}
    if "_target_" not in data:
        if (run := sources.run_config(name)) is None:
            raise UserError(
                f"data is missing: {name} does not say what it was trained on; add data=text data.path=FILE"
            )
        data = {**run["data"], **data}
        targets.require_trust(name, config.foreign_parts({"data": data}), values["trust"] is True)
    elif "data.block_size" not in keys and data.get("block_size") is not None:
        data = {**data, "block_size": block_size}
    return with_tokenizer({**values, "data": data}, keys, block_size, name)
