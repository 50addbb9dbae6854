"""Checkpoints of a run: the newest, the one before it, and the best."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gptlab.run import SAVED


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames: at every moment the file is the old or the new one, whole.
    Loads plain values and tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        temporary = Path(path).with_suffix(".tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except RuntimeError as error:  # torch's; the context is why the file could not be written
            raise error.__context__ or error from None
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether the step that has just been taken is followed by a validation."""
    due = trainer.should_stop or trainer.global_step % trainer.val_check_batch == 0
    return due and bool(trainer.enable_validation)


class Checkpointing(Checkpoint):
    """Keeps `last.ckpt` (every `every` optimizer steps, and whenever the validation loss has improved),
    `previous.ckpt` (the last before that) and `best.ckpt` (lowest validation loss) in the run's `checkpoints/`, and with
    `keep_every` a `step_00001000.ckpt` every so many steps, which is never removed.

    A step that is validated is saved after its validation; saved before, a resume would lose that validation.
    """

    def __init__(self, every: int, keep_every: int | None = None) -> None:
        self.every, self.keep_every = every, keep_every
        self.saved_at = 0  # the step of last.ckpt

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the names that a kill right after the save may have prevented."""
        self.saved_at = checkpoint["global_step"]
        if trainer.is_global_zero:
            self._add_names(Path(trainer.ckpt_path), best=checkpoint["best"].get("step") == self.saved_at)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not validation_is_due(trainer):
            self._save_if_due(trainer, best=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer, best=pl_module.best is pl_module.validated)

    def _save_if_due(self, trainer: L.Trainer, best: bool) -> None:
        step = trainer.global_step
        if best or trainer.should_stop or step % self.every == 0 or self._is_milestone(step):
            self.save(trainer)
            if trainer.is_global_zero:
                self._add_names(self.folder / "last.ckpt", best)

    def save(self, trainer: L.Trainer) -> None:
        """Raises OSError where the disk is full; what was saved before is still there then."""
        for logger in trainer.loggers:
            logger.save()  # first, or a run that is killed and resumed would lack what was not on the disk yet
        new, last = self.folder / "new.ckpt", self.folder / "last.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if last.exists():
                _link(last, self.folder / "previous.ckpt")
            os.replace(new, last)
            (self.folder.parent / SAVED).touch()
        self.saved_at = trainer.global_step

    def _is_milestone(self, step: int) -> bool:
        return self.keep_every is not None and step % self.keep_every == 0

    def _add_names(self, file: Path, best: bool) -> None:
        if best:
            _link(file, self.folder / "best.ckpt")
        if self._is_milestone(self.saved_at):
            _link(file, self.folder / f"step_{self.saved_at:08}.ckpt")


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, as no file is ever changed in place."""
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # still there if both were names of one file already
