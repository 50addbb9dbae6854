"""trainer.strategy=fsdp: each process keeps a part of the weights, gradients and optimizer state (FSDP2, Zhao et al. 2023).

Before a block computes, its weights are gathered from all processes, and freed after it. Checkpoints are those of one
process.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gptlab.model import Block
from gptlab.module import GPTModule


class FSDP(ModelParallelStrategy):
    """Lightning's, but it loads any checkpoint, whichever strategy saved it, and when others do: before training is set up."""

    restore_checkpoint_after_setup, lightning_restore_optimizer = False, True

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Saved here, parameters are numbered in the model's order, else in that of the optimizer's groups. In both, the order
        within the groups is the same."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: _part(value, parameter) for name, value in saved["state"].get(number, {}).items()}
                for number, parameter in zip(numbers, parameters, strict=True)
            }
            optimizer.load_state_dict({**saved, "state": state})


def _part(value: Tensor, parameter: DTensor) -> Tensor:
    """What this process keeps of a moment; Adam's step is a plain number."""
    if value.dim() == 0:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # all have it


class ShardedGPTModule(GPTModule):
    """gptlab's blocks are gathered one by one; the rest of the model, or a custom model without them, as a whole."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in self.model.modules():
            if isinstance(part, Block):
                fully_shard(part, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def clip_gradients(self, limit: float) -> Tensor:
        return super().clip_gradients(limit).full_tensor()

    def on_validation_start(self) -> None:
        """Gather all weights until the end of the validation: processes may have different numbers of batches, and only the
        first one samples."""
        self._gather(True)

    def on_validation_end(self) -> None:
        self._gather(False)

    def _gather(self, whole: bool) -> None:
        for part in self.model.modules():
            if isinstance(part, FSDPModule):
                if part is not self.model:  # whose weights stay from the forward to the backward pass anyway
                    part.set_reshard_after_forward(not whole, recurse=False)
                part.unshard() if whole else part.reshard()
