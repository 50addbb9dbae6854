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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = checkpoint["config"], checkpoint["state_dict"]
        tokenizer = from_state(checkpoint["tokenizer"])
        sizes = {key: value for key, value in config["model"].items() if key not in ("_target_", "compile")}
        target = config["model"].get("_target_")
        if target != GPTConfig._target_:
            raise ValueError(f"it holds a model of the class {target}, and only {GPTConfig._target_} can be loaded")
        model = GPT(vocab_size=tokenizer.vocab_size, block_size=config["data"]["block_size"], **sizes)
        prefix = "model."
        model.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
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
