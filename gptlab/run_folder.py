"""A callback of Hydra's: two processes never write into one run folder."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback

from gptlab import cli, runs


class RunFolder(Callback):
    """Takes the run folder for this process before Hydra writes anything into it."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        if not cli.is_first_process():
            return
        folder = Path(config.hydra.run.dir)
        try:
            runs.lock(folder)
            if config.resume is None and any((folder / name).exists() for name in ("run.json", "checkpoints")):
                raise ValueError(
                    f"{folder} holds a run already; continue it with resume={folder}, or give another hydra.run.dir"
                )
            return
        except ValueError as error:
            text = str(error)
        except OSError as error:
            text = f"{folder} cannot be written to ({error.strerror}): go where you may write, or give hydra.run.dir=FOLDER"
        print(f"\nerror: {text}", file=sys.stderr)  # an exception would become a warning of Hydra's
        sys.exit(2)
