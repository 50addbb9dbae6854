"""gptlab: experiments with GPT language models. PyTorch Lightning runs the loop, Hydra composes the experiment."""

import importlib.util
import os
import signal
import sys

__version__ = "0.1.0"

_modules = [module for flag, module in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"]
if any(module.startswith("gptlab.") for module in _modules) or os.path.basename(sys.argv[0]) in (
    "prepare_openwebtext.py",
    "export_hf.py",
):
    # Our own process: until training listens, Ctrl-C ends it here. Imports would swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if importlib.util.find_spec("hydra") is None:
        sys.exit(
            f"gptlab's dependencies are not installed in {sys.executable}; activate the environment: . .venv/bin/activate"
        )


def load(source: str, *, meta: str | None = None, trust: bool = False) -> tuple:
    """(model, tokenizer) from a run folder, a checkpoint (gptlab's or nanoGPT's), latest, a folder in Hugging Face's format,
    or gpt2, gpt2-medium, gpt2-large, gpt2-xl: `model(ids)` maps ids (B, T) to logits (B, T, V), on the CPU in eval mode.

    Raises:
        UserError (a ValueError): not there, damaged, or of a custom class without `trust`.
    """
    from gptlab import sources  # torch is imported only here

    loaded = sources.load(str(source), meta=meta, trust=trust)
    return loaded.model, loaded.tokenizer
