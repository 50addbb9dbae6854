"""Linear layers of oneDNN on CPUs. All private operators of torch that gptlab uses are in this file.

In float32, torch's own linear layers call MKL, which is hard to beat on Intel's CPUs, and on AMD's without AVX512.

Training (`OneDNNLinear`): large products are a matter of the kernel. Which one a CPU runs faster, machine.py measures.
Generating text (`PackedLinear`): a token needs every weight once; its time is that of memory, and of the calls. oneDNN keeps
a weight in the order in which its kernel for few rows reads it ("packed"), and in bfloat16 it is half as large.
"""

import contextlib
import copy
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gptlab.model import GPT

OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # of torch.ops.mkldnn
FEW_ROWS = 8  # that packed weights are best at


def has_operators() -> bool:
    """Whether this torch has oneDNN's operators for this CPU."""
    there = all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS) and torch.backends.mkldnn.is_available()
    return there and platform.machine() in ("x86_64", "AMD64")


def can_pack() -> bool:
    """Whether weights can be packed: not while a mode of torch's looks at operators (fake tensors, counting of FLOPs)."""
    return has_operators() and _get_current_dispatch_mode() is None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in).T + bias (out), by oneDNN. A weight may be packed, or a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNProduct(torch.autograd.Function):
    """`product` with its gradients. Keeps what torch's own keeps, and takes as much memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (rows, out)
        grad_x = None if weight is None else product(grad, weight.t())
        grad_weight = None if x is None else product(rows.t(), x.contiguous().flatten(0, -2).t())
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class OneDNNLinear(nn.Linear):
    """A linear layer by oneDNN where that is possible and pays: in float32, on a CPU, eagerly, for more than a few rows. Else
    the layer it was."""

    def forward(self, x: Tensor) -> Tensor:
        return OneDNNProduct.apply(x, self.weight, self.bias) if self.product_for(x) else super().forward(x)

    def product_for(self, x: Tensor) -> Callable[..., Tensor] | None:
        """What multiplies `x`, if not torch's own. The loss in chunks asks, too."""
        eager = not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
        fp32_on_cpu = type(x) is Tensor and x.is_cpu and x.dtype == self.weight.dtype == torch.float32
        many = x.shape[:-1].numel() > FEW_ROWS
        return product if eager and fp32_on_cpu and many and not torch.is_autocast_enabled("cpu") else None


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of a model oneDNN's, in place: parameters, their names and checkpoints stay the same."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


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
        return product(x.to(self.dtype), self.weight, self.bias).to(x.dtype)


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
            if isinstance(child, nn.Linear) and pays(child.weight, dtype, rows):
                weight, bias = child.weight, child.bias
                if child is copied.lm_head:  # without the padding
                    weight, bias = weight[: copied.vocab_size], None
                setattr(module, name, PackedLinear(weight, bias, dtype, hint))
    return copied
