"""From a checkpoint file to a model that can be used. The file is treated as hostile: only plain values and tensors
are read from it, and only models that gptlab itself defines are built."""

import pickle
from pathlib import Path
from typing import Any

import torch

from gptlab.config import GPTConfig
from gptlab.model import GPT
from gptlab.tokenizer import CharTokenizer, from_state


def load(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, CharTokenizer, dict[str, Any]]:
    """The model in eval mode on `device`, its tokenizer, and the run's config.

    Raises:
        ValueError: not a checkpoint of gptlab, damaged, or of a model class of somebody else's.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        config, weights = checkpoint["config"], checkpoint["state_dict"]
        tokenizer = from_state(checkpoint["tokenizer"])
        sizes = dict(config["model"])
        block_size = config["data"]["block_size"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of gptlab, or it is damaged ({type(error).__name__}: {error})"
        ) from None
    target = sizes.pop("_target_", None)
    if target != GPTConfig._target_:
        raise ValueError(f"{path} holds a model of the class {target}; only {GPTConfig._target_} can be loaded")
    sizes.pop("compile", None)
    model = GPT(vocab_size=tokenizer.vocab_size, block_size=block_size, **sizes)
    prefix = "model."
    try:
        model.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its own config ({error})") from None
    return model.to(device).eval(), tokenizer, config
