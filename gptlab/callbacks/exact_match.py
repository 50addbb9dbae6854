"""Accuracy on held-out problems."""

import logging
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from gptlab.callbacks.interrupts import in_a_hurry
from gptlab.data.problems import ProblemData
from gptlab.generate import Sampler, generate

log = logging.getLogger(__name__)


class ExactMatch(L.Callback):
    """For problem data sets, measures val/accuracy: the share of held-out problems whose whole answer greedy generation
    gets right. Prints up to `show` wrong answers. Idle for other data.

    Greedy generation is right exactly if, after each right prefix of the answer, the most likely symbol is the right
    one; so one forward pass over question and answer suffices.
    """

    def __init__(self, show: int) -> None:
        self.show = show

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._exact = self._asked = 0
        self._mistakes: list[Tensor] = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, _, batch, *rest: Any) -> None:
        if not isinstance(trainer.datamodule, ProblemData):
            return
        ids, mask = batch
        with trainer.precision_plugin.forward_context():
            likely = pl_module.model(ids[:, :-1])[..., : pl_module.model.vocab_size].argmax(dim=-1)
        exact = ((likely == ids[:, 1:]) | ~mask[:, 1:]).all(dim=1)
        self._exact, self._asked = self._exact + exact.sum(), self._asked + len(ids)
        if len(self._mistakes) < self.show and not trainer.sanity_checking:
            self._mistakes += ids[~exact][: self.show - len(self._mistakes)]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._asked:
            counts = torch.tensor([int(self._exact), self._asked], device=pl_module.device)
            exact, asked = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
            pl_module.extra_val_metrics["val/accuracy"] = exact / asked

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (self._mistakes and trainer.is_global_zero) or in_a_hurry(trainer):
            return
        if not math.isfinite(pl_module.validated["val/loss"]):  # nothing can be generated
            return
        data = trainer.datamodule
        log.info("    some wrong answers:")
        problems = torch.stack(self._mistakes).tolist()
        questions = [problem[: data.n_question] for problem in problems]
        with trainer.precision_plugin.forward_context():
            steps = list(generate(pl_module.model, questions, data.n_answer, sampler=Sampler(temperature=0)))
        for problem, question_ids, answer in zip(problems, questions, zip(*steps, strict=True), strict=True):
            question, right = data.written(problem)
            wrong = data.written([*question_ids, *answer])[1]
            if wrong != right:  # equal where rounding decides between two symbols
                log.info("    %s%s, not %s", question, right, wrong)
