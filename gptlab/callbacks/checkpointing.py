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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except RuntimeError as error:  # torch's, about what it could not write; the reason comes with it
            reason = error.__cause__ or error.__context__
            if not isinstance(reason, OSError):
                raise
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether the step that has just been taken is followed by a validation."""
    due = trainer.should_stop or trainer.global_step % trainer.val_check_batch == 0
    return due and bool(trainer.enable_validation)


class Checkpointing(Checkpoint):
    """Keeps `last.ckpt` (every `every` optimizer steps, and whenever the validation loss has improved),
    `previous.ckpt` (the last before that) and `best.ckpt` (lowest validation loss) in the run's `checkpoints/`.

    A step that is validated is saved after its validation; saved before, a resume would lose that validation.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.saved_at = 0  # the step of last.ckpt

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        save_due = trainer.should_stop or trainer.global_step % self.every == 0
        if save_due and not validation_is_due(trainer):
            self.save(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make up for the mark as the best, which a kill after the save may have left out."""
        self.saved_at = checkpoint["global_step"]
        if trainer.is_global_zero and checkpoint["best"].get("step") == self.saved_at:
            self._link(Path(trainer.ckpt_path), self.folder / "best.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        improved = pl_module.best is pl_module.validated
        if improved or trainer.should_stop or trainer.global_step % self.every == 0:
            self.save(trainer)
        if improved and trainer.is_global_zero:
            self._link(self.folder / "last.ckpt", self.folder / "best.ckpt")

    def save(self, trainer: L.Trainer) -> None:
        """Raises OSError where the disk is full or the like; what was saved before is still there then."""
        for logger in trainer.loggers:
            logger.save()  # first, or a run that is killed and resumed would lack what was not on the disk yet
        new, last = self.folder / "new.ckpt", self.folder / "last.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if last.exists():
                self._link(last, self.folder / "previous.ckpt")
            os.replace(new, last)
            (self.folder.parent / SAVED).touch()
        self.saved_at = trainer.global_step

    @staticmethod
    def _link(source: Path, target: Path) -> None:
        """A second name for the same file: nothing is written twice, and no file is ever changed in place."""
        temporary = target.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # still there if both were names of one file already
