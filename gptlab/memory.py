"""Memory that training takes: one optimizer step of the real model on fake tensors, which have shapes but no data.

    build model -> AdamW state -> forward and backward of a micro-batch        on fake tensors, in about 0.2 s
                      \\_ LiveBytes sees every tensor come and go _/           -> peak, compared with the device's memory

Only tensors count. A process adds Python's and torch's own (a few hundred MB); on a CPU the C library also keeps freed
memory, so that a process may take up to about twice its tensors.
"""

import bisect
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab import optim
from gptlab.errors import UserError
from gptlab.model import nats

CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
ADAMW = {"lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.0}
LESS_MEMORY = "use a smaller model or data.block_size, model.activation_checkpointing=true, or trainer.precision=bf16 (in a new run)"


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, and their `peak`. Works on real tensors, too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors: all of them at the peak of a step, and those of weights, gradients and optimizer state."""

    peak: int
    state: int
    device_type: str

    def __str__(self) -> str:
        process = "; a CPU process may take twice as much" if self.device_type == "cpu" else ""
        state = f"{format_bytes(self.state)} weights, gradients and optimizer state{process}"
        return f"{format_bytes(self.peak)} of tensors ({state})"


def estimate_step(
    build: Callable[[], nn.Module],
    *,
    block_size: int,
    sequences: int,  # of an optimizer step, in this process
    micro_batch_size: int,
    precision: str,  # 32, bf16 or fp16
    optim_config: dict[str, Any] = ADAMW,  # the keys of conf/optim
    device_type: str,
    averaged: bool = False,  # EMA keeps a second copy of the weights
    distributed: bool = False,  # DDP keeps a second copy of the gradients
    shards: int = 1,  # FSDP: of so many, this process keeps one; a validation has all weights besides
) -> Estimate | None:
    """Memory of one optimizer step as `gptlab.module` does it; nothing of that size is allocated. None where fake
    tensors cannot take the model's path, such as control flow that depends on values."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    try:
        with FakeTensorMode(), LiveBytes() as live, torch.device(device_type):
            model = build()
            _copies = [torch.empty_like(p) for p in model.parameters() for _ in range(averaged + distributed)]
            fused = device_type in ("cpu", "cuda") and precision != "fp16"
            optimizer = optim.build(model, fused=fused, **optim_config)
            trained = [p for p in model.parameters() if p.requires_grad]
            several = sequences > micro_batch_size  # the gradients of one micro-batch are there during the next
            for parameter in trained:
                if several or shards == 1:
                    parameter.grad = torch.empty_like(parameter)
                else:  # each leaves the process as soon as it is there
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            if shards == 1:
                optimizer.step()  # makes the moments
            else:
                _kept = [p.new_empty(-(-p.numel() // shards)) for p in trained for _ in range(3)]  # moments and weights
            state = live.now
            if not several:
                optimizer.zero_grad(set_to_none=True)
            ids = torch.zeros(min(sequences, micro_batch_size), block_size + 1, dtype=torch.int64)
            # Lightning's autocast keeps no copies either.
            with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
                loss = nats(model, ids)
                with torch.autocast(device_type, enabled=False):
                    loss.backward()
            return Estimate(live.peak, state, device_type)
    except Exception:  # from a custom model; if it is no fault of fake tensors, building it for real shows it
        return None


def check_fits(estimate: Callable[[int], Estimate | None], micro_batch_size: int, available: int) -> str | None:
    """A line on the memory that training takes, by an estimate for a micro-batch size; None where nothing is known.

    Raises:
        UserError: more than `available` bytes; the text names the largest micro-batch that fits, or another remedy.
    """
    needed = estimate(micro_batch_size)
    if needed is None:
        return None
    summary = f"{needed}; {format_bytes(available)} available"
    if needed.peak <= available:
        return summary
    fitting = bisect.bisect_right(range(1, micro_batch_size), available, key=lambda size: estimate(size).peak)
    remedy = f"try data.micro_batch_size={fitting}" if fitting else f"not even one sequence fits; {LESS_MEMORY}"
    raise UserError(f"data.micro_batch_size={micro_batch_size} needs {summary}; {remedy}")


def capacity(device: torch.device) -> int:
    """Bytes of a GPU's own memory; else of the machine's, or of this process's control groups (v2) if one has less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    own = OWN_CGROUP.read_text().strip().rpartition("0::/")[2] if OWN_CGROUP.is_file() else ""
    group = CGROUP / own
    for folder in (group, *group.parents[: len(Path(own).parts)]):  # SLURM limits the job above its steps
        file = folder / "memory.max"
        if file.is_file() and (limit := file.read_text().strip()) != "max":
            limits.append(int(limit))
    return min(limits)


def format_bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def out_of_memory(error: RuntimeError) -> bool:
    """CPUs and Apple's GPUs have no class of their own for it."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
