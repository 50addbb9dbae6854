"""Callbacks with which the tests disturb a run, as custom callbacks of a user: a signal, a fault, a full disk.

What has happened is noted in files of the working directory, so that it does not happen again to the resumed run.
"""

import errno
import multiprocessing.process
import os
import signal
import time
from pathlib import Path

import lightning
import torch
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gptlab.callbacks import checkpointing


def once(name: str) -> bool:
    done = Path(name).exists()
    Path(name).touch()
    return not done


class Send(lightning.Callback):
    """Sends its own process a signal in step `at` (`in`), after it (`after`), in the middle of its validation, or while
    its second worker is started; on one rank, while the others are late. `then`: seconds to hang."""

    def __init__(self, at, signum, when="after", rank=0, late=0.0, then=0.0):
        self.moment, self.signum, self.rank, self.late, self.then = (when, at), signum, rank, late, then

    def send(self, trainer, when, step):
        if (when, step) == self.moment and not Path("signal-was-sent").exists():
            if trainer.global_rank != self.rank:
                time.sleep(self.late)
            elif once("signal-was-sent"):
                os.kill(os.getpid(), self.signum)
                time.sleep(self.then)

    def setup(self, trainer, pl_module, stage):
        start, started = multiprocessing.process.BaseProcess.start, []

        def start_and_send(process):
            start(process)
            started.append(process)
            self.send(trainer, "worker", len(started))

        multiprocessing.process.BaseProcess.start = start_and_send

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "in", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.send(trainer, "after", trainer.global_step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            self.send(trainer, "validation", trainer.global_step)

    def on_exception(self, trainer, pl_module, exception):
        Path(f"ended-{trainer.global_rank}").write_text(f"{trainer.global_step} {exception}")


class Fail(lightning.Callback):
    def __init__(self, rank=0):
        self.rank = rank

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 7 and trainer.global_rank == self.rank and once("failed"):
            raise KeyError("a fault in a callback")


class Hang(lightning.Callback):
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_step == 5 and once("hangs"):
            time.sleep(300)


class KillUnsaved(lightning.Callback):
    """Twice, after the validation of step 9, all of which is logged, and before its checkpoint."""

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == 9 == pl_module.validated["step"] and (once("first") or once("second")):
            for logger in trainer.loggers:
                logger.save()
            os.kill(os.getpid(), signal.SIGKILL)


class End(lightning.Callback):
    """As trainer.max_time does: it ends a resumed run before Lightning begins it."""

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 6:
            trainer.should_stop = True
            Path("over").touch()

    def on_fit_start(self, trainer, pl_module):
        trainer.should_stop = Path("over").exists()


class Poison(lightning.Callback):
    """The loss of step `at` is NaN, on one rank."""

    def __init__(self, at=8, rank=0):
        self.at, self.rank = at, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_step + 1, trainer.global_rank) == (self.at, self.rank):
            self.hook = pl_module.model.register_forward_hook(lambda model, ids, logits: logits * float("nan"))

    def on_train_batch_end(self, trainer, *rest):
        if (trainer.global_step, trainer.global_rank) == (self.at, self.rank):
            self.hook.remove()


class Record(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.save(batch, "batch.pt")


class Scarce(lightning.Callback):
    """A device that has room for so many sequences at a time."""

    def __init__(self, room):
        self.room = room

    def on_fit_start(self, trainer, pl_module):
        def check(model, inputs):
            if len(inputs[0]) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        pl_module.model.register_forward_pre_hook(check)


class FullDisk(lightning.Callback):
    """After step 9, half a checkpoint fits on the disk."""

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 9 and once("disk-is-full"):
            checkpointing.torch.save = self.save

    def save(self, content, file):
        file.write(b"half" * 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


class CountSyncs(lightning.Callback):
    """Counts how often gradients are added up over the processes, under DDP or FSDP, and how many micro-batches there are."""

    def on_train_start(self, trainer, pl_module):
        self.syncs = self.micro_batches = 0
        strategy, scatter = trainer.strategy, distributed.reduce_scatter_single
        if hasattr(strategy.model, "register_comm_hook"):
            strategy.model.register_comm_hook(None, self.all_reduce)

        def count(*arguments, **rest):
            self.syncs += 1
            return scatter(*arguments, **rest)

        distributed.reduce_scatter_single = count
        pl_module.model.register_full_backward_hook(self.count)

    def count(self, *rest):
        self.micro_batches += 1

    def all_reduce(self, state, bucket):
        self.syncs += bucket.is_last()
        return allreduce_hook(None, bucket)

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            Path("syncs").write_text(f"{self.syncs} {self.micro_batches}")
