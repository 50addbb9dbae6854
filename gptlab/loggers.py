"""Where metrics are logged: metrics.jsonl in every run, and what the config's `logger` adds."""

import contextlib
import csv
import io
import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from gptlab.config import VALIDATED
from gptlab.errors import UserError
from gptlab.resume import leaf_values
from gptlab.run import Metrics, Run, read_metrics, write_atomic
from gptlab.sweep import Sweep
from gptlab.targets import build

HYPER_PARAMETERS = ("seed", "model.", "optim.", "data.name", "data.block_size", "data.batch_size", "trainer.max_steps",
                    "trainer.precision")  # fmt: skip
TENSORBOARD = "gptlab.loggers.TensorBoard"
WATCHED = ("clipped_share", "data_wait", "grad_norm", "mfu", "tokens_per_s")
TAGS = {f"train/{name}": f"watch/{name}" for name in WATCHED}  # TensorBoard sorts by name: losses come first


def make_loggers(
    node: dict[str, Any] | None, run: Run, data: dict[str, str], state: dict[str, Any], resuming: bool
) -> list[Logger]:
    """metrics.jsonl and the config's logger (its node), both without what will be logged again after the checkpoint, whose
    `state` is {} if the run starts at step 0. Raises UserError if Weights & Biases cannot be used."""
    start_step = state.get("global_step", 0)
    due = state != {} and state["callbacks"]["Interrupts"]["validation_due_at"] is not None
    metrics = Metrics(run.folder / "metrics.jsonl", data, start_step, validation_due=due)
    if node is None:
        return [MetricsFile(metrics)]
    arguments = {**node, "save_dir": str(run.folder)}
    target = arguments.pop("_target_")
    if resuming and target == TENSORBOARD:
        # TensorBoard hides what it has from this step on. It knows whole steps only: what is kept of one is logged again.
        arguments["purge_step"] = start_step + 1 if start_step and not due else start_step
    logger = build("logger", target, arguments)
    if isinstance(logger, TensorBoard) and due:
        for entry in metrics.kept:
            if entry["step"] == start_step:
                values = {name: math.nan if value is None else value for name, value in entry.items() if name != "step"}
                logger.log_metrics(values, start_step)
    if isinstance(logger, WandbLogger):
        from wandb.errors import Error

        try:
            _ = logger.experiment  # before training starts
        except Error as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"logger=wandb: {reason}; run `wandb login`, or add logger.offline=true") from None
    return [MetricsFile(metrics), logger]


class FileLogger(Logger):
    """For loggers that write a file of the run folder, which names the run and holds its config already."""

    name, version = "", ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class MetricsFile(FileLogger):
    """metrics.jsonl, as a logger of Lightning's."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._metrics.append(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        self._metrics.sync()


class TensorBoard(TensorBoardLogger):
    """Event files in the run folder itself: `tensorboard --logdir outputs` names a run NAME/DATE."""

    def __init__(self, save_dir: str, purge_step: int | None = None) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self._open()

    @rank_zero_only
    def _open(self) -> None:
        """Name the event file so that it sorts last: TensorBoard reads files in the order of the times in their names, and
        the clock may have been set back."""
        times = [path.name.split(".")[3] for path in Path(self.log_dir).glob("events.out.tfevents.*")]
        latest = max([int(time.time()), *(int(text) + 1 for text in times if text.isdigit())])
        with mock.patch("tensorboard.summary.writer.event_file_writer.time.time", lambda: latest):
            _ = self.experiment

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics({TAGS.get(name, name): value for name, value in metrics.items()}, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True)
        self.experiment.add_text("settings", "    " + text.replace("\n", "\n    "))  # indented: Markdown for code
        values, varied = dict(leaf_values(params)), self._varied()
        table = {
            key: value if type(value) in (int, float) else str(value)
            for key, value in {**values, **varied}.items()
            if key in varied or (key.startswith(HYPER_PARAMETERS) and not key.endswith(("_target_", ".compile")))
        }
        experiment, start, _end = hparams(table, dict.fromkeys(VALIDATED, 0.0))
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in varied  # TensorBoard lists these first
        plugin_data.content = content.SerializeToString()
        self.experiment.file_writer.add_summary(experiment)
        self.experiment.file_writer.add_summary(start)

    def _varied(self) -> dict[str, Any]:
        """The keys that a sweep varies, and their values in this one of its jobs."""
        folder = Path(self.save_dir)
        with contextlib.suppress(UserError):  # not in a sweep
            return next((job.values for job in Sweep.read(folder.parent).jobs if job.folder == folder.name), {})
        return {}

    @rank_zero_only
    def save(self) -> None:
        self.experiment.flush()  # without Lightning's hparams.yaml: there is config.yaml


class CSVTable(FileLogger):
    """metrics.csv for spreadsheets: metrics.jsonl as a table with a row per step, rewritten with each checkpoint and at
    the end, so that a resume needs no care of its own."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    @rank_zero_only
    def save(self) -> None:
        if not (metrics := self._folder / "metrics.jsonl").exists():  # Lightning saves once before anything is logged
            return
        rows: dict[int, dict[str, Any]] = {}
        for entry in read_metrics(metrics):
            rows.setdefault(entry["step"], {}).update(entry)
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        write_atomic(self._folder / "metrics.csv", table.getvalue().encode("utf-8"))

    def finalize(self, status: str) -> None:
        self.save()
