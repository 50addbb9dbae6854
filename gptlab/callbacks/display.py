"""What a run shows while it trains: a progress bar, a line per validation, samples."""

import logging
import math
import sys
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from gptlab.callbacks.interrupts import in_a_hurry
from gptlab.errors import UserError
from gptlab.generate import Sampler, generate
from gptlab.terminal import printable

log = logging.getLogger(__name__)


class Progress(L.Callback):
    """A bar with time left, loss and speed (on terminals only), and a line per validation (there and in train.log)."""

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
                # A narrow terminal cuts off the end: the most important comes first. 60 columns suffice for all of it.
                bar_format="{percentage:3.0f}%|{bar}| {remaining} left, step {n_fmt}/{total_fmt}{postfix}",
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch, batch_idx: int) -> None:
        logged = pl_module.logged
        if self._bar is not None and trainer.global_step % pl_module.log_every == 0 and "train/loss" in logged:
            speed = f", {logged['train/tokens_per_s']:,.0f} tok/s" if "train/tokens_per_s" in logged else ""
            self._bar.set_postfix_str(f"loss {logged['train/loss']:.3f}{speed}", refresh=False)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._bar is not None:
            self._bar.update()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            v = pl_module.validated
            more = f"{v['val/bits_per_byte']:.4f} bits per byte"
            if "val/accuracy" in v:
                more = f"{100 * v['val/accuracy']:.2f} % answered exactly"
            step = str(v["step"]).rjust(len(str(trainer.max_steps)))
            log.info("step %s: validation loss %.4f, %s", step, v["val/loss"], more)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end


class SampleText(L.Callback):
    """After each validation, prints a continuation of `prompt`, or of the tokenizer's `start`, and puts it into
    TensorBoard's text tab. It depends on weights and step alone: it has a random generator of its own."""

    def __init__(self, prompt: str | None, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
        self.prompt, self.max_new_tokens, self.temperature, self.top_k = prompt, max_new_tokens, temperature, top_k

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.encode_prompt(trainer.datamodule.tokenizer)

    def encode_prompt(self, tokenizer: Any) -> None:
        """Raises UserError if the tokenizer cannot."""
        try:
            self._ids = tokenizer.encode(self.prompt or tokenizer.start)
        except ValueError as error:
            raise UserError(f"callbacks.sample_text.prompt: {error}") from None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if not math.isfinite(pl_module.validated["val/loss"]):
            log.info("no sample: the validation loss is not finite")
            return
        text = self._sample(trainer, pl_module).strip("\n").replace("\n", "\n    ")
        log.info("\n    %s\n", printable(text))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # indented: Markdown leaves such text as it is
                logger.experiment.add_text("samples", f"    {text}", trainer.global_step)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        ids, sampler = self._ids.tolist(), Sampler(self.temperature, self.top_k)
        with trainer.precision_plugin.forward_context():
            for (next_id,) in generate(
                pl_module.model, [ids], self.max_new_tokens, sampler=sampler, seeds=[trainer.global_step]
            ):
                ids.append(next_id)
                if in_a_hurry(trainer):
                    log.info("the sample is cut short: the run was asked to stop")
                    break
        return trainer.datamodule.tokenizer.decode(ids)
