"""trainer.strategy=fsdp: each process keeps a part of the weights, gradients and optimizer state (FSDP2, Zhao et al. 2023).

Before a block computes, its weights are gathered from all processes, and freed after it. Checkpoints are those of one
process.
"""

import contextlib
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from gptlab.model import Block
from gptlab.module import GPTModule


class FSDP(ModelParallelStrategy):
    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Any process's checkpoint, whichever strategy saved it: Lightning numbers an optimizer's state in the order of the
        model's parameters, torch in that of its groups; here, the order within the groups tells."""
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            ours = (names[p] for group in optimizer.param_groups for p in group["params"])
            name = dict(zip((i for group in saved["param_groups"] for i in group["params"]), ours, strict=True))
            groups = [{**group, "params": [name[i] for i in group["params"]]} for group in saved["param_groups"]]
            state = {name[i]: values for i, values in saved["state"].items()}
            set_optimizer_state_dict(self.model, optimizer, {"state": state, "param_groups": groups}, options=options)
        return checkpoint


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
