"""What the guards cost: tokens per second with all of them on and all of them off: python scripts/benchmark_guards.py

On is what `python -m gptlab.train` does. Off is the same step without a look at what is not finite, without the watch
on losses and clipping, without the way back where memory does not suffice, and with Lightning's own signal handlers.
Both train the default model in one process, in turns, on a machine that must be idle; the ratio is the median of the rounds.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from gptlab import config, train
from gptlab.callbacks.interrupts import Interrupts
from gptlab.data.windows import ids_and_mask
from gptlab.module import GPTModule

SKIPPED = 50  # steps, until all is warm


class Unguarded(GPTModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        self._seed_dropout(step)
        optimizer, lr = self.optimizers(), self._learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = self.accumulate_gradients(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.sums = self.sums + torch.stack((loss, self.gradient_norm)) if step % self.log_every else torch.zeros(2)
        if (step + 1) % self.log_every == 0:
            loss, norm = (self.sums / self.log_every).tolist()
            self.log_metrics({"train/loss": loss, "train/lr": lr, "train/grad_norm": norm})

    def accumulate_gradients(self, batch: Any) -> Tensor:
        ids, mask = ids_and_mask(batch)
        loss = self.nats(ids, mask) / self._counted_tokens(ids, mask)
        self.manual_backward(loss)
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim_config["grad_clip"])


class Clock(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == SKIPPED:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "began", 0.0)


def tokens_per_s(cfg: Any, run: Path, guarded: bool) -> float:
    data = train.make_data(cfg, resuming=False)
    module = train.make_module(train.plain(cfg), data)
    trainer = train.make_trainer(cfg, run, data, train.make_loggers(cfg, run, data.record, {}))
    if not guarded:
        module.__class__ = Unguarded
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, Interrupts)]
    clock = Clock()
    trainer.callbacks.append(clock)
    trainer.fit(module, data)
    return (cfg.trainer.max_steps - SKIPPED) * data.batch_size * data.block_size / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("overrides", nargs="*", help="of the config, such as model=gpt-mini hardware=gpu")
    arguments = parser.parse_args()
    train.quiet_lightning()
    logging.disable(logging.WARNING)
    config.register()
    overrides = [f"trainer.max_steps={arguments.steps}", f"trainer.val_every={arguments.steps}",
                 "++trainer.extra.limit_val_batches=0", "callbacks=progress"]  # fmt: skip
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = config.typed(compose("train", [*overrides, *arguments.overrides]), "train")
    train.settle_machine(cfg)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            speed = {}
            for guarded in (True, False)[:: 1 if number % 2 else -1]:
                speed[guarded] = tokens_per_s(cfg, Path(folder) / f"{number}_{guarded}", guarded)
            ratios.append(speed[True] / speed[False])
            print(
                f"round {number + 1}: on {speed[True]:,.0f}, off {speed[False]:,.0f} tokens/s, ratio {ratios[-1]:.4f}",
                flush=True,
            )
    print(f"median ratio over {len(ratios)} rounds: {statistics.median(ratios):.4f}")


if __name__ == "__main__":
    main()
