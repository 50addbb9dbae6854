"""Memory that training takes: one optimizer step of the real model on fake tensors, which have shapes but no data.

    build model -> AdamW state -> forward and backward of a micro-batch        on fake tensors, in about 0.2 s
                      \\_ LiveBytes sees every tensor come and go _/           -> peak, compared with the device's memory

Only tensors count. A process adds Python's and torch's own (a few hundred MB); on a CPU the C library also keeps freed
memory, so that a process may take up to about twice its tensors.
"""

import bisect
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptlab import optim
from gptlab.errors import UserError

CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LESS_MEMORY = "use a smaller model or data.block_size, model.activation_checkpointing=true, or trainer.precision=bf16 (in a new run)"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are alive; `peak` is the most at any time.

    Buffers inside a kernel are not seen. Works on real tensors too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

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
    sequences: int,
    micro_batch_size: int,
    precision: str,
    device_type: str,
    averaged: bool = False,
    distributed: bool = False,
) -> Estimate | None:
    """Memory of one optimizer step as `gptlab.module` does it; nothing of that size is allocated.

    Args:
        build: makes the model.
        sequences: of an optimizer step, in this process.
        precision: 32, bf16 or fp16.
        averaged: there is a second copy of the weights, as EMA keeps.
        distributed: there is a second copy of the gradients, as DDP sends.

    Returns:
        None where fake tensors cannot take the model's path, such as control flow that depends on values.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    try:
        with FakeTensorMode(), LiveBytes() as live, torch.device(device_type):
            model = build()
            _copies = [torch.empty_like(p) for p in model.parameters() for _ in range(averaged + distributed)]
            fused = device_type in ("cpu", "cuda") and precision != "fp16"
            optimizer = optim.adamw(model, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()  # makes the moments
            state = live.now
            if sequences <= micro_batch_size:  # else the gradients of one micro-batch are there during the next
                optimizer.zero_grad(set_to_none=True)
            ids = torch.zeros(min(sequences, micro_batch_size), block_size + 1, dtype=torch.int64)
            with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
                loss = _summed_loss(model, ids)
                with torch.autocast(device_type, enabled=False):
                    loss.backward()
            return Estimate(live.peak, state, device_type)
    except Exception:  # from a custom model; if it is no fault of fake tensors, building it for real shows it
        return None


def _summed_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def check_fits(estimate: Callable[[int], Estimate | None], micro_batch_size: int, available: int) -> str | None:
    """A line that says what training takes of the `available` bytes; None where nothing is known.

    Args:
        estimate: of a micro-batch size, such as a `functools.partial` of `estimate_step`.

    Raises:
        UserError: it takes more; the text names the largest micro-batch that fits, or what else to do.
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
    """Bytes of a GPU's own memory; otherwise of the machine's, or of its container's or job's if that has less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Of this process's control group and those around it (version 2), or of the container (version 1)."""
    groups = OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.is_file() else []
    own = CGROUP / next((line[3:].strip("/") for line in groups if line.startswith("0::")), "")
    files = [folder / "memory.max" for folder in (own, *own.parents) if folder.is_relative_to(CGROUP)]
    for file in (*files, CGROUP / "memory/memory.limit_in_bytes"):
        text = file.read_text().strip() if file.is_file() else "max"
        if text != "max":
            yield int(text)


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.{0 if size >= 100 else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def out_of_memory(error: RuntimeError) -> bool:
    """CPUs and Apple's GPUs have no class of their own for it."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
