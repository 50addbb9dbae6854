"""Shows what the model writes, so that one sees it learn."""

import logging
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from gptlab.callbacks.interrupts import Interrupts
from gptlab.generate import generate

log = logging.getLogger(__name__)


class SampleText(L.Callback):
    """After each validation, print a continuation of `prompt` and put it into TensorBoard's text tab.

    Without a prompt, the tokenizer's `start` is continued. The text depends on the weights and the step alone: it has
    a random generator of its own.
    """

    def __init__(self, prompt: str | None, max_new_tokens: int, temperature: float, top_k: int | None) -> None:
        self.prompt, self.max_new_tokens, self.temperature, self.top_k = prompt, max_new_tokens, temperature, top_k

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.encode_prompt(trainer.datamodule.tokenizer)

    def encode_prompt(self, tokenizer: Any) -> None:
        """Raises ValueError if the tokenizer cannot."""
        self._start = self.prompt or tokenizer.start
        try:
            self._ids = tokenizer.encode(self._start)
        except ValueError as error:
            raise ValueError(f"callbacks.sample_text.prompt: {error}") from None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if not math.isfinite(pl_module.validated["val/loss"]):
            log.info("no sample: the validation loss is not finite")
            return
        idx = torch.from_numpy(self._ids.astype("int64")).to(pl_module.device)[None]
        generator = torch.Generator(pl_module.device).manual_seed(trainer.global_step)
        with trainer.precision_plugin.forward_context():
            new = []
            for next_id in generate(
                pl_module.model,
                idx,
                self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                generator=generator,
            ):
                new.append(int(next_id))
                if any(isinstance(callback, Interrupts) and callback.in_a_hurry for callback in trainer.callbacks):
                    log.info("the sample is cut short: the run was asked to stop")
                    break
        text = trainer.datamodule.tokenizer.decode([*self._ids.tolist(), *new])
        lines = [f"    {line}" for line in text.strip("\n").split("\n")]  # indented: Markdown leaves such text as it is
        log.info("\n%s\n", "\n".join(lines))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", "\n".join(lines), trainer.global_step)
