"""One batch learned by heart: the first thing to try on a model or an optimizer that does not learn."""

import logging
import math
from collections.abc import Iterator

import lightning as L
from torch.utils.data import DataLoader, Sampler

log = logging.getLogger(__name__)

NOT_LEARNED = """\
WARNING: one batch was not learned: loss %.3f after %d steps, and not %g.
Usually
  optim.lr is far too high or too low, or trainer.max_steps too few;
  the targets are not the inputs shifted by one, or masked away;
  a parameter gets no gradient, or is not given to the optimizer;
  the model is very small"""


class Overfit(L.Callback):
    """Trains on the batch of the first step in every step, without dropout, and ends the run once train/loss is at most
    `target`."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.learned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = trainer.datamodule
        every_step = data.train_dataloader

        def train_dataloader() -> DataLoader:
            loader = every_step()
            return DataLoader(loader.dataset, sampler=FirstStepOnly(loader.sampler), batch_size=None)

        data.train_dataloader = train_dataloader

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.model.eval()  # no dropout, whatever the model's keys are called

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step % pl_module.log_every == 0 or trainer.should_stop:  # train/loss is new
            self.learned = pl_module.logged["train/loss"] <= self.target
            trainer.should_stop = trainer.should_stop or self.learned

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        loss, steps = pl_module.logged.get("train/loss", math.nan), trainer.global_step
        if self.learned:
            log.info("one batch learned: loss %.3f after %d steps", loss, steps)
        else:
            log.warning(NOT_LEARNED, loss, steps, self.target)


class FirstStepOnly(Sampler[int]):
    """Step 0 as often as there are steps left, with the length that Lightning counts by."""

    def __init__(self, steps: Sampler[int]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[int]:
        return (0 for _ in self.steps)

    def __len__(self) -> int:
        return len(self.steps)
