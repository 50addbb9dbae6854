"""SIGTERM, Ctrl-C, a closed terminal and a cluster's requeue signal: finish the step, save, and end."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed as dist

from gptlab.callbacks.checkpointing import Checkpointing, validation_is_due
from gptlab.data.windows import kill_workers
from gptlab.jobs import sweep_is_gone

HURRY = 3.0  # seconds after a signal; a cluster kills after 30
BOUNCE = 1.0  # seconds within which a second Ctrl-C is not meant


class Interrupted(BaseException):
    """The run was asked to end, and has saved what it could. (No Exception: nothing on the way should swallow it.)"""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts(Checkpoint):
    """Ends the run in a state from which it resumes exactly; under SLURM also on SIGUSR1.

    Until this process has begun a step there is nothing to save, and the run ends at once. From then on it ends after the
    step, or before or within its validation, which can take longer than a cluster waits: then the checkpoint says so, and
    the resumed run begins with that validation. Several processes agree on where they stop, as a signal may have reached
    only one of them. (Lightning's own handlers end with status 0, save nothing, and deadlock where processes are apart.)
    """

    def __init__(self) -> None:
        self._signum, self.asked_at = 0, math.inf
        self._may_end_at_once = False
        self._validation_due_at: int | None = None
        self._group: Any = None
        self._common_batches = 0

    def state_dict(self) -> dict[str, Any]:
        return {"validation_due_at": self._validation_due_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._validation_due_at = state["validation_due_at"]

    @contextlib.contextmanager
    def listening(self, trainer: L.Trainer) -> Iterator[None]:
        """From before other processes are started until they have ended."""
        self._may_end_at_once, self._pid = trainer.world_size == 1, os.getpid()
        signals = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signals.append(signal.SIGHUP)
        before = {signum: signal.signal(signum, self._handle) for signum in signals}
        try:
            yield
        except Interrupted:
            kill_workers()
            raise
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # ours stay

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # it waits for the device at each step
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the host: no step waits for a GPU
        if self._validation_due_at is not None:  # where nothing else is left to do, Lightning would not even begin
            self._final = self._validation_due_at >= trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += self._final
            self._should_stop, trainer.should_stop = trainer.should_stop or self._final, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._validation_due_at is None:
            return
        trainer.fit_loop.epoch_loop.max_steps -= self._final
        trainer.should_stop = self._should_stop
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # it restarts, wherever it was left
        trainer.validating = True
        self._may_end_at_once = False  # its result will be there to save
        validation.run()
        trainer.training = True

    def on_train_batch_start(self, *_: Any) -> None:
        self._may_end_at_once = False

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a worker that was just forked
            return
        if signum == self._signum == signal.SIGINT and time.monotonic() - self.asked_at > BOUNCE:
            raise KeyboardInterrupt
        self._signum, self.asked_at = signum, min(self.asked_at, time.monotonic())
        if signum == signal.SIGHUP:  # the terminal is gone: what writes to it would fail
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if self._may_end_at_once:
            self._may_end_at_once = False  # once
            raise Interrupted(signum)
        if signum == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # Ctrl-C has ended the `tee` that this goes to
                os.write(1, b"\nstopping after this step; Ctrl-C stops at once\n")  # logging is not safe here

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % pl_module.log_every == 0 and sweep_is_gone():
            self._signum = signal.SIGTERM
        self._stop_if_asked(trainer, validation_is_due(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_due_at = None
        batches = min(sum(trainer.num_val_batches), sys.maxsize)  # infinite for a loader without a length
        self._common_batches = self._reduce(int(batches), dist.ReduceOp.MIN)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx < self._common_batches:
            self._stop_if_asked(trainer, validation_due=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer, validation_due=False)

    def _reduce(self, value: int, op: Any) -> int:
        shared = torch.tensor(value)
        if self._group is not None:
            dist.all_reduce(shared, op, self._group)
        return int(shared)

    def _stop_if_asked(self, trainer: L.Trainer, validation_due: bool) -> None:
        """Save and stop if any of the processes got a signal."""
        if not (signum := self._reduce(self._signum, dist.ReduceOp.MAX)):
            return
        step = trainer.global_step
        self._validation_due_at = step if validation_due else None
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpointing) and step > 0 and (validation_due or callback.saved_at != step):
                callback.save(trainer)
        raise Interrupted(signum)


def in_a_hurry(trainer: L.Trainer) -> bool:
    """Whether a signal came so long ago that what can be left out should be."""
    interrupts = (callback for callback in trainer.callbacks if isinstance(callback, Interrupts))
    return any(time.monotonic() - callback.asked_at > HURRY for callback in interrupts)
