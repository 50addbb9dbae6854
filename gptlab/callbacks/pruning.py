"""Ends a job of a sweep before max_steps if the others did better."""

import contextlib
import logging
import operator
import statistics
from collections.abc import Iterator
from pathlib import Path

import lightning as L

from gptlab.errors import UserError
from gptlab.run import read_metrics

log = logging.getLogger(__name__)


class MedianPruning(L.Callback):
    """Ends a run whose `monitor` is worse than the median of the other jobs' at the same step, once `startup` of them have
    been validated there. Idle outside a sweep.

    A simple form of the rule in Golovin et al., "Google Vizier", 2017. What the others have logged decides: with one job
    at a time that is a function of the earlier jobs, with several it also depends on their speeds.
    """

    def __init__(self, monitor: str, startup: int) -> None:
        self.monitor, self.startup = monitor, startup
        self.why: str | None = None  # why the run ended; None if it did not end here

    def state_dict(self) -> dict[str, str | None]:
        return {"why": self.why}

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        self.why = state["why"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.why is not None
        if trainer.is_global_zero and not (Path(trainer.default_root_dir).parent / "sweep.json").exists():
            log.info("median_pruning: not a job of a sweep, so nothing to compare with")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor not in pl_module.validated:
            raise UserError(f"callbacks.median_pruning.monitor={self.monitor}: this data set does not measure it")
        if trainer.sanity_checking or trainer.should_stop:
            return
        why = self._compare(pl_module.validated[self.monitor], trainer) if trainer.is_global_zero else None
        self.why = trainer.strategy.broadcast(why)
        trainer.should_stop = self.why is not None

    def _compare(self, value: float, trainer: L.Trainer) -> str | None:
        """Why the run is to end; None if it continues."""
        others = list(self._others(Path(trainer.default_root_dir), trainer.global_step))
        if len(others) < self.startup:
            return None
        median = statistics.median(others)
        good_enough = operator.ge if self.monitor == "val/accuracy" else operator.le
        if good_enough(value, median):  # NaN is not
            return None
        return f"{self.monitor} {value:.4f} is worse than {median:.4f}, the median of {len(others)} other jobs at this step"

    def _others(self, run: Path, step: int) -> Iterator[float]:
        """What the sweep's other jobs on the same data measured at this step."""
        if not (run.parent / "sweep.json").exists():
            return
        data = _first_line(run / "metrics.jsonl")
        for path in run.parent.glob("*/metrics.jsonl"):
            with contextlib.suppress(OSError, UserError):  # a damaged file is that job's trouble
                if path.parent != run and _first_line(path) == data:
                    values = (entry.get(self.monitor) for entry in read_metrics(path) if entry["step"] == step)
                    yield from (value for value in values if isinstance(value, float))  # not finite: null


def _first_line(metrics: Path) -> bytes:
    """Which data the metrics are about."""
    with open(metrics, "rb") as file:
        return file.readline()
