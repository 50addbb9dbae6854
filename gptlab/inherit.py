"""What a config takes from weights that exist: their sizes and tokenizer (train init_from=...), a run's own data (evaluate)."""

from collections.abc import Collection
from typing import Any

from gptlab import config, targets
from gptlab.errors import UserError

TEXT = "gptlab.data.text.TextData"


def train_config(values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The config of a run that starts from the weights `init_from`, which decide most of `model`, and the tokenizer.

    Args:
        keys: given on the command line.

    Raises:
        UserError: these contradict the weights, or there are none.
    """
    from gptlab import sources

    name = sources.locate(values["init_from"])
    filled, block_size = sources.architecture(name)
    if refused := [key for key in keys if key.startswith("model.") and key.removeprefix("model.") in filled]:
        raise UserError(
            f"{', '.join(refused)}: decided by init_from={name}; leave it out (model.{', model.'.join(sources.OWN)} can be set)"
        )
    model = values["model"]
    if "model" in keys and (wrong := [key for key in filled if model.get(key) != filled[key]]):
        has = ", ".join(f"model.{key}={filled[key]}" for key in wrong)
        raise UserError(f"model: init_from={name} has {has}; leave model=NAME out")
    model = {**model, **filled} if model.get("_target_") == filled["_target_"] else filled
    values = {**values, "init_from": name, "model": model}
    return with_tokenizer(values, keys, block_size, f"init_from={name}")


def with_tokenizer(values: dict[str, Any], keys: Collection[str], block_size: Any, source: str) -> dict[str, Any]:
    """The config with data for weights of that context length: a text is encoded with the weights' tokenizer."""
    data = values["data"]
    if isinstance(data.get("block_size"), int) and isinstance(block_size, int) and data["block_size"] > block_size:
        raise UserError(
            f"data.block_size={data['block_size']} must be <= {block_size}, as {source} knows no more positions"
        )
    if data.get("_target_") == TEXT and not {"data.tokenizer", "data.vocab_size"} & {*keys}:
        data = {**data, "tokenizer": "init_from", "vocab_size": None}
    return {**values, "data": data}


def evaluation_config(values: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The config of an evaluation: on the data that the model was trained on, with what the command line changes, or on a
    chosen data set with the model's context length. Raises UserError if there are none."""
    from gptlab import sources

    name = str(sources.choose(values["ckpt"], values["init_from"]))
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
