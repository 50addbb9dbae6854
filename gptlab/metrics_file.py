"""metrics.jsonl: every logged metric of a run as one line of JSON, whatever other loggers there are."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptlab.run import write_atomic

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Appends `{"step": s, name: value, ...}` per log event, after a first line that says which data it is about.
    Values that are not finite are written as null.

    A run that starts at `start_step` first drops the lines that it will write again: those of later steps, and with
    `validation_due` those of that step's validation.
    """

    def __init__(self, path: Path, start_step: int, data: dict[str, str], validation_due: bool) -> None:
        super().__init__()
        self.path = path
        self._file = None
        self._start_step, self._validation_due = start_step, validation_due
        self._header = json.dumps({"step": 0, "data": data}) + "\n"

    def kept(self) -> list[dict[str, Any]]:
        """What earlier processes logged and this one will not log again.

        Raises:
            ValueError: the file is damaged.
        """
        if not (self._start_step and self.path.exists()):
            return []
        lines = self.path.read_text("utf-8").splitlines(keepends=True)[1:]
        try:
            logged = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut off
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} is damaged ({error}): mend it, or move it away to go on without it"
            ) from None
        return [entry for entry in logged if not self._comes_again(entry)]

    def _comes_again(self, entry: dict[str, Any]) -> bool:
        due_then = self._validation_due and any(name.startswith("val/") for name in entry)
        return entry["step"] > self._start_step or (due_then and entry["step"] == self._start_step)

    @rank_zero_only
    def _open(self) -> None:
        if self._start_step and not self.path.exists():
            log.warning("%s is gone: it begins anew, after step %d", self.path, self._start_step)
        lines = [self._header, *(json.dumps(entry) + "\n" for entry in self.kept())]
        write_atomic(self.path, "".join(lines).encode("utf-8"))
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
