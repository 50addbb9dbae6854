"""How fast training goes: tokens per second, and the share of the hardware's peak that is used."""

import re
import time
from typing import Any

import lightning as L
import torch

from gptlab.data.windows import TimedLoader
from gptlab.sizing import PEAK_FLOPS


class Throughput(L.Callback):
    """Logs train/tokens_per_s, train/data_wait (the share of time spent waiting for the next batch) and, where the
    device's peak is known, train/mfu (model FLOPs utilization, PaLM, Chowdhery et al. 2022). The clock runs over training
    steps and stands still during validation and sampling."""

    def __init__(self) -> None:
        self.tokens = self.seconds = self.waited = 0.0  # of the whole process, up to where the clock was stopped
        self._at_log = (0.0, 0.0, 0.0)  # the same at the last log
        self._since: tuple[float, float] | None = None  # time and seconds waited when the clock was started

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        flops = getattr(pl_module.model, "flops_per_token", None)
        peak = peak_flops(pl_module.device, str(trainer.precision))
        self._mfu_per_token = flops() / (peak * trainer.world_size) if flops and peak else None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._since is None:
            self._since = _read_clock(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.tokens += trainer.datamodule.batch_size * trainer.datamodule.block_size
        if trainer.global_step % pl_module.log_every == 0 or trainer.should_stop:
            self._stop_clock(trainer)
            totals = (self.tokens, self.seconds, self.waited)
            tokens, seconds, waited = (now - before for now, before in zip(totals, self._at_log, strict=True))
            if seconds:  # 0: a clock that stands still
                metrics = {"train/tokens_per_s": tokens / seconds}
                if isinstance(trainer.train_dataloader, TimedLoader):
                    metrics["train/data_wait"] = waited / seconds
                if self._mfu_per_token:
                    metrics["train/mfu"] = self._mfu_per_token * tokens / seconds
                pl_module.log_metrics(metrics)
            self._at_log, self._since = totals, _read_clock(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._since is not None:
            self._stop_clock(trainer)

    def _stop_clock(self, trainer: L.Trainer) -> None:
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        now, waited = _read_clock(trainer)
        self.seconds += now - self._since[0]
        self.waited += waited - self._since[1]
        self._since = None


def _read_clock(trainer: L.Trainer) -> tuple[float, float]:
    """Time, and the seconds waited for the loader so far."""
    return time.perf_counter(), getattr(trainer.train_dataloader, "waited", 0.0)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak of 16-bit matrix products on this device, or None if unknown or not used."""
    if device.type != "cuda" or not precision.startswith(("bf16", "16")):
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(NVL|Laptop|Max-Q)\b", name):  # slower variants under the same name
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
