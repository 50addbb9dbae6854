"""A callback of Hydra's: two processes never write into one run folder."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from gptlab import cli
from gptlab import run as runs

MADE = ("config.yaml", "run.json", "metrics.jsonl", "checkpoints", "summary.json")  # by a run, or a user's own files
WRITTEN_INTO = ("checkpoints", "tensorboard", "train.log")  # the others are replaced as a whole


class RunFolder(Callback):
    """Takes the run folder for this process before Hydra writes anything into it."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        if not cli.is_first_process():
            return
        folder, resuming = Path(config.hydra.run.dir), config.resume is not None
        try:
            runs.lock(folder)
            there = [name for name in MADE if (folder / name).exists()]
            if there and not resuming:
                raise ValueError(f"{folder} holds a run already ({', '.join(there)}); continue it with resume={folder}")
            for path in [folder, *(folder / name for name in WRITTEN_INTO)]:
                if path.exists() and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return
        except ValueError as error:
            text = str(error) + ("" if resuming else "; or give another hydra.run.dir (with -m: hydra.sweep.dir)")
        except OSError as error:
            place = error.filename or folder
            remedy = "resume a copy of the run" if resuming else "give hydra.run.dir=FOLDER"
            text = f"{place} cannot be written to ({error.strerror}): go where you may write, or {remedy}"
        print(f"\nerror: {text}", file=sys.stderr)  # an exception would become a warning of Hydra's
        sys.exit(2)
