"""What the hardware allows: python benchmark_ceiling.py {fp32,bf16} {cpu,cuda} prints the fastest matrix product, in FLOP/s."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptlab.linear import PackedLinear, can_pack
from gptlab.model import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gemm_peak(precision: str, device: str, tries: int = 10) -> float:
    """FLOP/s of the fastest of several products of two matrices, 2048 x 2048 (8192 x 8192 on a GPU), by each library that
    torch has for it."""
    n = 2048 if device == "cpu" else 8192
    x, weight = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    products: list[Callable[[], Any]] = [lambda: F.linear(x, weight)]
    if device == "cpu" and can_pack():  # oneDNN, where torch takes MKL
        packed = PackedLinear(weight, None, weight.dtype, n)
        products.append(lambda: packed(x))
    seconds = [time_of(product, device) for _ in range(tries) for product in products]
    return 2 * n**3 / min(seconds)


def time_of(product: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    product()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def flops_per_token(vocab_size: int, size: dict[str, Any]) -> float:
    """Floating-point operations of one training step of gptlab's GPT, forward and backward, counted; those of matrix
    products alone. Attention counts in full, as where it is computed without regard to the mask."""
    gpt = GPT(vocab_size=vocab_size, **{key: n for key, n in size.items() if key not in ("batch_size", "dropout")})
    ids = torch.zeros(1, gpt.block_size, dtype=torch.int64)
    # Fused attention is one operator to the counter, which knows no formula for the CPU's.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(gpt(ids).flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops() / gpt.block_size


if __name__ == "__main__":
    with torch.no_grad():
        print(gemm_peak(*sys.argv[1:]))
