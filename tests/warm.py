"""Runs `python -m MODULE ARGUMENTS...` in forks of a process that has imported what takes long, and nothing of gptlab:
a fifth of the time of a new process, and it behaves the same in every test. Requests and answers are lines of JSON.
"""

# ruff: noqa: F401
import atexit
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

import hydra.utils
import lightning
import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import tiktoken
import tokenizers
import torch
import torch.utils.tensorboard
import torchmetrics
import tqdm.contrib.logging

TIMEOUT = 300  # seconds


def become(request: dict[str, Any]) -> None:
    """What a new process would begin with."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.path[0] = request["cwd"]
    sys.path[1:1] = [path for path in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = [request["module"], *request["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]


def run(request: dict[str, Any]) -> int:
    try:
        become(request)
        signal.alarm(TIMEOUT)
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status: Any = 0
    except SystemExit as ended:
        status = ended.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status or 0


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            os._exit(run(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
