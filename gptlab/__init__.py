"""gptlab: experiments with GPT language models. PyTorch Lightning runs the loop, Hydra composes the experiment."""

import os
import signal
import sys

__version__ = "0.1.0"

if any(
    pair[0] == "-m" and pair[1].startswith("gptlab.") for pair in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
) or (os.path.basename(sys.argv[0]) == "prepare_openwebtext.py"):
    # Our own process: until training listens, Ctrl-C ends it here. Imports would swallow a KeyboardInterrupt.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
