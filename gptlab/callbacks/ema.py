"""A moving average of the weights, which often generalizes better than the weights themselves."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights (Polyak and Juditsky 1992), used by validation, samples and a checkpoint's
    `state_dict`. Callbacks that need it in on_validation_end come before this one; those that save checkpoints, after it.

    The average after step n + 1 is `d * average + (1 - d) * weights` with d = min(decay, (1 + n) / (10 + n)), which soon
    forgets the first, bad weights (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # AveragedModel looks at its counter in each step: on a GPU, that would wait for the device.
        self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _average(self, averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        n = self._latest_update_step
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + n) / (10 + n)))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swap back later: samples are drawn in on_validation_end."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._swapped:
            self._swap_models(pl_module)

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:  # saved in the middle of a validation
            average, weights = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint.update(state_dict=average, current_model_state=weights)
