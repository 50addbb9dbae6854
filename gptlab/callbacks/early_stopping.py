"""Ends a run before max_steps once a validation metric stops improving."""

import lightning as L
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


class EarlyStopping(callbacks.EarlyStopping):
    """Lightning's; also, a run killed between its end and its summary stays ended when resumed."""

    def __init__(self, monitor: str, patience: int, min_delta: float) -> None:
        mode = "max" if monitor == "val/accuracy" else "min"
        super().__init__(monitor=monitor, patience=patience, min_delta=min_delta, mode=mode)

    @property
    def why(self) -> str | None:
        """Why the run ended; None if it did not end here."""
        if self.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            return None
        if self.stopping_reason == EarlyStoppingReason.NON_FINITE_METRIC:
            return f"{self.monitor} is not finite"
        return f"{self.monitor} has not improved in the last {self.wait_count} validations"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.why is not None
