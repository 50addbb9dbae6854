"""metrics.jsonl: every logged metric of a run as one line of JSON, whatever other loggers there are."""

import json
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptlab.runs import write_atomic


class MetricsFile(Logger):
    """Appends `{"step": s, name: value, ...}` per log event, after a first line that says which data it is about.
    Values that are not finite are written as null.

    A run that starts at `start_step` first drops the lines of later steps, which it will write again.
    """

    def __init__(self, path: Path, start_step: int, data: dict[str, str]) -> None:
        super().__init__()
        self.path = path
        self._file = None
        self._start_step = start_step
        self._header = json.dumps({"step": 0, "data": data}) + "\n"

    @rank_zero_only
    def _open(self) -> None:
        kept = [self._header]
        if self._start_step and self.path.exists():
            for line in self.path.read_text("utf-8").splitlines(keepends=True)[1:]:
                if not line.endswith("\n") or json.loads(line)["step"] > self._start_step:
                    break
                kept.append(line)
        write_atomic(self.path, "".join(kept).encode("utf-8"))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (stays open for the run)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._file is None:
            self._open()
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    @rank_zero_only
    def save(self) -> None:
        """Called before each checkpoint, which must never be ahead of the metrics."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters have config.yaml."""

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""
