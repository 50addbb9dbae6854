"""Linear layers for generating text on CPUs. All private operators of torch that gptlab uses are in this file.

A token needs every weight once: its time is that of memory, and of the calls. oneDNN keeps a weight in the order in which
its kernel for few rows reads it ("packed"), and in bfloat16 it is half as large. In float32, torch's own linear layers
call MKL, which is hard to beat on Intel's CPUs alone.
"""

import contextlib
import copy
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gptlab.model import GPT

OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # of torch.ops.mkldnn
FEW_ROWS = 8  # that packed weights are best at


def can_pack() -> bool:
    """Whether this torch has oneDNN's operators for packed weights, and none of its modes looks at operators (fake tensors,
    counting of FLOPs)."""
    has_operators = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS) and torch.backends.mkldnn.is_available()
    return has_operators and platform.machine() in ("x86_64", "AMD64") and _get_current_dispatch_mode() is None


@functools.cache
def is_intel() -> bool:
    with contextlib.suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    return "Intel" in platform.processor()


def fast_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("avx512_bf16", "amx_tile"))


def pays(weight: Tensor, dtype: torch.dtype, rows: int) -> bool:
    """Whether packing makes a linear layer faster, as measured (scripts/README.md)."""
    if dtype == torch.float32 and is_intel():
        return rows > 1 and weight.numel() >= 1024 * 1024
    return weight.numel() >= 256 * 256  # below, a call costs more than it saves


class PackedLinear(nn.Module):
    """A linear layer whose weight (out, in) is packed for `rows` rows and of type `dtype`; input and output keep theirs.
    Without gradients. Any number of rows works, some are faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.dtype, self.weight = dtype, torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self._plain = (weight, bias)  # a tuple: no parameters of this module

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return F.linear(x, *self._plain)
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        return y.to(x.dtype)


def pack(model: nn.Module, dtype: torch.dtype = torch.float32, rows: int = FEW_ROWS) -> nn.Module:
    """A copy of a GPT for generating text, `rows` sequences at a time: its large linear layers are packed, all else is
    shared with the model.

    The model itself where that is impossible: a custom model, a GPU, a torch without the operators. The copy can neither
    be trained nor saved: packed weights are no parameters, and the tied ones have become two.
    """
    weight = next(model.parameters())
    if type(model) is not GPT or weight.device.type != "cpu" or weight.dtype != torch.float32 or not can_pack():
        return model
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    hint = min(rows, FEW_ROWS) if dtype == torch.float32 else FEW_ROWS
    for module in [*copied.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear and pays(child.weight, dtype, rows):
                outputs = copied.vocab_size if child is copied.lm_head else None  # without the padding
                setattr(module, name, PackedLinear(child.weight[:outputs], child.bias, dtype, hint))
    if isinstance(copied.lm_head, PackedLinear):
        copied.padding = None
    return copied
