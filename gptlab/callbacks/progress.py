"""The terminal: a progress bar while training, and a line for each validation."""

import logging
import sys

import lightning as L
from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """A bar with loss, tokens/s and time left (on terminals only), and a line per validation (there and in train.log)."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                leave=False,
                mininterval=0.25,
                bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}]",
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        logged = pl_module.logged
        if self._bar is not None and trainer.global_step % pl_module.log_every == 0 and "train/loss" in logged:
            text = f"loss {logged['train/loss']:.3f}"
            if "train/tokens_per_s" in logged:
                text += f", {logged['train/tokens_per_s']:,.0f} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            v = pl_module.validated
            text = f"step {v['step']:{len(str(trainer.max_steps))}d}: validation loss {v['val/loss']:.4f}"
            if "val/accuracy" in v:
                log.info("%s, %.2f %% answered exactly", text, 100 * v["val/accuracy"])
            else:
                log.info("%s, %.4f bits per byte", text, v["val/bits_per_byte"])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
