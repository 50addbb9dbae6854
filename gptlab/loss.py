"""The loss over a large vocabulary without all of its logits: positions in chunks, gradients along with them.

    x (N, C) -> chunk (n, C) -> logits (n, V) -> log-softmax -> nats
                                                 \\_ softmax - one-hot -> dx (n, C), added to dW (V, C)

The logits of GPT-2's 50,257 tokens at 4 x 1,024 positions are 0.8 GB in fp32, and plain autograd keeps three to four tensors
of that size. Here only those of a chunk exist, and nothing is computed twice: the backward pass merely scales gradients
that the forward pass has left (Liger Kernel, Hsu et al. 2024).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Logits at a time, 64 and 128 MiB in fp32. Every chunk also reads and writes all of dW: on a GPU, fewer rows would not pay.
CHUNK = {"cpu": 2**24, "cuda": 2**25}
MOST_CHUNKS = 64  # of a huge vocabulary, each would be a row


def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of targets (...), int64, -100 where none counts, under logits (..., V): nats in fp32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def chunk_size(positions: int, weight: Tensor) -> int | None:
    """Positions at a time; None where the logits of all of them are few enough for plain autograd."""
    rows = max(CHUNK.get(weight.device.type, CHUNK["cuda"]) // len(weight), math.ceil(positions / MOST_CHUNKS))
    return rows if positions > rows else None


@torch.compiler.disable  # compiled, the loop would be unrolled
def summed_nats(x: Tensor, head: nn.Linear, targets: Tensor, rows: int) -> Tensor:
    """Summed cross-entropy of targets (N,), int64, -100 where none counts, under the logits head(x) of x (N, C),
    `rows` of them at a time. A bias (V,) of zeros and -inf gets no gradient."""
    product = head.product_for(x) if hasattr(head, "product_for") else None  # linear.OneDNNLinear has it
    return _LinearCrossEntropy.apply(x, head.weight, head.bias, targets, rows, torch.is_grad_enabled(), product)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets, rows, with_gradients, product):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        dx, dw = (torch.zeros_like(t) if with_gradients else None for t in (x, weight))  # fp32 under autocast, too
        # Both serve every chunk: the kernel takes its time to hand out fresh memory. A `product` brings its own.
        all_logits = x.new_empty(0 if product else rows, len(w), dtype=dtype)
        all_p = x.new_empty(rows, len(w), dtype=torch.float32)
        nats = all_p.new_zeros(())
        for start in range(0, len(x), rows):
            part, target = x[start : start + rows].to(dtype), targets[start : start + rows, None]
            counted, target = target != -100, target.clamp(min=0)
            p = all_p[: len(part)]  # (n, V), as the logits
            logits = product(part, w) if product else torch.mm(part, w.T, out=all_logits[: len(part)])
            if bias is not None:
                logits += bias
            torch.log_softmax(logits, -1, dtype=torch.float32, out=p)
            nats -= (p.gather(1, target) * counted).sum()
            if with_gradients:
                p.exp_().scatter_add_(1, target, p.new_full(target.shape, -1.0))
                d, part = p.to(dtype), part * counted
                torch.mul(product(d, w.T) if product else d @ w, counted, out=dx[start : start + rows])
                dw.addmm_(d.T, part) if dw.dtype == dtype else dw.add_(d.T @ part)
        ctx.save_for_backward(dx, dw)
        return nats

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        return dx.mul_(scale), dw.mul_(scale), None, None, None, None, None
