"""Where the time of a training step goes, operator by operator."""

import logging
import os
import time
from pathlib import Path

import lightning as L
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gptlab.run import write_atomic

log = logging.getLogger(__name__)


class Profile(L.Callback):
    """Runs `steps` optimizer steps, after the first `skip_steps`, under PyTorch's profiler, in the first process.

    Shows the `rows` operators that take most time themselves (on an accelerator: of the accelerator's time), and
    writes all of them to `profile/table.txt` and the course of events to `profile/trace.json` in the run folder.
    """

    def __init__(self, skip_steps: int, steps: int, rows: int) -> None:
        self.skip_steps, self.steps, self.rows = skip_steps, steps, rows
        self._profiler: profile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = trainer.global_step + self.skip_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step == self._first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own start and stop are no news
            activities = [ProfilerActivity.CPU] if pl_module.device.type == "cpu" else None  # None: all there are
            self._profiler = profile(activities=activities)
            self._profiler.start()
            self._since = self._now(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.should_stop or trainer.global_step == self._first + self.steps:
            self._finish(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._finish(trainer, pl_module)  # left running, the profiler would crash the interpreter on its way out

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, pl_module)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            seconds = self._now(pl_module.device) - self._since
            profiler.stop()
            if steps := trainer.global_step - self._first:
                self._report(profiler, Path(trainer.default_root_dir) / "profile", seconds, steps, pl_module.device)

    @staticmethod
    def _now(device: torch.device) -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    def _report(self, profiler: profile, folder: Path, seconds: float, steps: int, device: torch.device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "trace.tmp"
        profiler.export_chrome_trace(str(temporary))
        os.replace(temporary, folder / "trace.json")
        key = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
        events = profiler.key_averages()
        write_atomic(folder / "table.txt", events.table(sort_by=key, row_limit=-1).encode("utf-8"))
        log.info("\n%s", self._table(events, key, 1000 * seconds / steps, steps))
        log.info(
            "all operators: profile/table.txt in the run folder\n"
            "each event: profile/trace.json there; https://ui.perfetto.dev shows it\n"
        )

    def _table(self, events: list, key: str, total: float, steps: int) -> str:
        """At most 80 columns. Times are milliseconds per step, shares are of the whole step."""
        operators = {}  # kernels have rows of their own, beside those of the operators that start them
        for event in events:
            if event.device_type == DeviceType.CPU:
                calls, ms = operators.get(event.key, (0.0, 0.0))
                operators[event.key] = calls + event.count / steps, ms + getattr(event, key) / 1000 / steps
        slowest = sorted(operators.items(), key=lambda item: -item[1][1])[: self.rows]
        rest = total - sum(ms for _, (_, ms) in slowest)
        lines = [f"{'operator':<44}{'calls/step':>11}{'ms/step':>11}{'share':>9}"]
        lines += [f"{shortened(name):<44}{calls:>11.1f}{ms:>11.2f}{ms / total:>9.1%}" for name, (calls, ms) in slowest]
        lines += [f"{'everything else':<44}{'':>11}{rest:>11.2f}{rest / total:>9.1%}"]
        lines += [f"{'one step':<44}{'':>11}{total:>11.2f}{1:>9.1%}"]
        return "\n".join(lines)


def shortened(name: str) -> str:
    """To 43 characters: operators often differ in their last word alone."""
    return name if len(name) <= 43 else f"{name[:20]}...{name[-20:]}"
