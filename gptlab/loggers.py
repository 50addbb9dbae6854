"""Where metrics are logged: metrics.jsonl in every run, and what the config's `logger` adds."""

import csv
import io
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gptlab.errors import UserError
from gptlab.run import Metrics, Run, write_atomic
from gptlab.targets import build


def make_loggers(
    node: dict[str, Any] | None, run: Run, data: dict[str, str], state: dict[str, Any], resuming: bool
) -> list[Logger]:
    """metrics.jsonl and the config's logger, both without what will be logged again after the checkpoint.

    Args:
        node: `logger` of the config, plain values.
        data: name and checksums.
        state: of the checkpoint that the run resumes from; {} if it starts at step 0.

    Raises:
        UserError: metrics.jsonl is damaged, or Weights & Biases cannot be used.
    """
    start_step = state.get("global_step", 0)
    due = state != {} and state["callbacks"]["Interrupts"]["validation_due_at"] is not None
    metrics = Metrics(run.folder / "metrics.jsonl", data, start_step, validation_due=due)
    if node is None:
        return [MetricsFile(metrics)]
    arguments = {**node, "save_dir": str(run.folder)}
    target = arguments.pop("_target_")
    if resuming and target.endswith(".TensorBoardLogger"):
        # TensorBoard hides what it has from this step on. It knows whole steps only: what is kept of one is logged again.
        arguments["purge_step"] = start_step + 1 if start_step and not due else start_step
    logger = build("logger", target, arguments)
    if isinstance(logger, TensorBoardLogger):
        open_newest(logger)
        for entry in metrics.kept if due else []:
            if entry["step"] == start_step:
                values = {name: math.nan if value is None else value for name, value in entry.items() if name != "step"}
                logger.log_metrics(values, start_step)
    if isinstance(logger, WandbLogger):
        connect(logger)
    return [MetricsFile(metrics), logger]


class MetricsFile(Logger):
    """metrics.jsonl, as a logger of Lightning's."""

    name, version = "metrics", ""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._metrics.append(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        self._metrics.sync()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""


class CSVTable(Logger):
    """metrics.csv for spreadsheets: metrics.jsonl as a table with a row per step, rewritten with each checkpoint and at
    the end, so that a resume needs no care of its own."""

    name, version = "csv", ""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """They are in metrics.jsonl."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        if not (metrics := self._folder / "metrics.jsonl").exists():  # Lightning saves once before anything is logged
            return
        rows: dict[int, dict[str, Any]] = {}
        for line in metrics.read_bytes().splitlines(keepends=True)[1:]:
            if line.endswith(b"\n"):  # a kill may have cut the last one
                entry = json.loads(line)
                rows.setdefault(entry["step"], {}).update(entry)
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_atomic(self._folder / "metrics.csv", table.getvalue().encode("utf-8"))

    def finalize(self, status: str) -> None:
        self.save()


@rank_zero_only
def open_newest(logger: TensorBoardLogger) -> None:
    """Start the event file of this process with a name that sorts last: TensorBoard reads files in the order of the
    times in their names, and the clock may have been set back."""
    from tensorboard.summary.writer import event_file_writer

    times = [name.split(".")[3] for name in (path.name for path in Path(logger.log_dir).glob("events.out.tfevents.*"))]
    later = max([int(time.time()), *(int(text) + 1 for text in times if text.isdigit())])
    with mock.patch.object(event_file_writer, "time", SimpleNamespace(time=lambda: later)):
        _ = logger.experiment


@rank_zero_only
def connect(logger: WandbLogger) -> None:
    """Start the run at Weights & Biases, before training does.

    Raises:
        UserError: no API key, no network, or a value that it refuses.
    """
    from wandb.errors import Error

    try:
        _ = logger.experiment
    except Error as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"logger=wandb: {reason}; run `wandb login`, or add logger.offline=true") from None
