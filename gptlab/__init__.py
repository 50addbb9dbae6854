"""gptlab: experiments with GPT language models. PyTorch Lightning runs the loop, Hydra composes the experiment."""

import importlib.util
import os
import signal
import sys

__version__ = "0.1.0"

_modules = [module for flag, module in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"]
if (
    any(module.startswith("gptlab.") for module in _modules)
    or os.path.basename(sys.argv[0]) == "prepare_openwebtext.py"
):
    # Our own process: until training listens, Ctrl-C ends it here. Imports would swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if importlib.util.find_spec("hydra") is None:
        sys.exit(
            f"gptlab's dependencies are not installed in {sys.executable}; activate the environment: . .venv/bin/activate"
        )
