"""Helpers for a run that does not learn (`debug=overfit`) or is slow (`debug=profile`)."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger(__name__)

NOT_OVERFIT = """\
WARNING: one batch was not overfit: loss %.3f after %d steps; the target is %g.
Common causes:
  optim.lr is far too high or too low, or trainer.max_steps too small;
  the targets are not the inputs shifted by one, or are masked;
  a parameter gets no gradient, or is not given to the optimizer;
  the model is very small"""


class Overfit(L.Callback):
    """Trains on the first step's batch in every step, without dropout, until train/loss <= `target`."""

    def __init__(self, target: float) -> None:
        self.target, self.reached = target, False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        every_step = trainer.datamodule.train_dataloader

        def first_step() -> DataLoader:
            loader = every_step()
            return DataLoader(FirstStep(loader.dataset), sampler=loader.sampler, batch_size=None)

        trainer.datamodule.train_dataloader = first_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.eval()  # no dropout, also in custom models

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % pl_module.log_every == 0 or trainer.should_stop:  # train/loss is new
            self.reached = pl_module.logged["train/loss"] <= self.target
            trainer.should_stop = trainer.should_stop or self.reached

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss, steps = pl_module.logged.get("train/loss", math.nan), trainer.global_step
        if trainer.is_global_zero and self.reached:
            log.info("one batch overfit: loss %.3f after %d steps", loss, steps)
        elif trainer.is_global_zero:
            log.warning(NOT_OVERFIT, loss, steps, self.target)


class FirstStep(Dataset):
    """The batch of step 0, whichever is asked for."""

    def __init__(self, steps: Dataset) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> Any:
        return self.steps[0]


class Profile(L.Callback):
    """Runs `steps` optimizer steps, after the first `skip_steps`, under PyTorch's profiler, in the first process.

    Prints the `rows` operators that take most time themselves, and writes `profile/trace.json` in the run folder.
    Lightning's PyTorchProfiler is no substitute: it counts validation batches as steps, and after an exception it keeps
    running, which crashes the interpreter on its way out.
    """

    def __init__(self, skip_steps: int, steps: int, rows: int) -> None:
        self.skip_steps, self.steps, self.rows = skip_steps, steps, rows
        self._profiler: profile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.global_step + self.skip_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step == self._first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no lines about the profiler's own start and stop
            on_cpu = pl_module.device.type == "cpu"
            self._profiler = profile(activities=[ProfilerActivity.CPU] if on_cpu else None)  # None: all there are
            self._profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._first + self.steps:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (profiler := self._stop()) is not None:
            trace = Path(trainer.default_root_dir) / "profile/trace.json"
            trace.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            key = f"self_{'cpu' if pl_module.device.type == 'cpu' else 'device'}_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=self.rows, max_name_column_width=40)
            log.info("\n%d steps:\n%s", trainer.global_step - self._first, table)
            log.info("timeline: profile/trace.json in the run folder; open it at https://ui.perfetto.dev\n")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> profile | None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler
