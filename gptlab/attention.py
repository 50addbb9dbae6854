"""Dropout and causal attention as CPUs compute them fastest; on other devices, and when compiled, torch's own.

torch draws a float for every element that dropout may drop, which takes a CPU longer than the rest of attention. Here,
a random byte decides.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

BLOCK = 64  # queries at a time: no block computes the keys after it, almost half of all


def draw(x: Tensor, p: float) -> tuple[Tensor, int, float]:
    """What of `x` to drop with probability `p`, from torch's generator.

    A byte is exact to 1/512; where that is coarse, two bytes, to 1/131072. The factor is 1 / (1 - the probability in
    force), so expectations are exact.

    Returns:
        Random integers of the shape of `x`; the threshold below which to drop; the factor for what is kept.
    """
    bits, dtype = (8, torch.int8) if 1 / 32 <= p <= 31 / 32 else (16, torch.int16)
    count, values = x.numel(), 2**bits
    words = x.new_empty(-(-count * bits // 64), dtype=torch.int64).random_(-(2**63), None)  # by default, 63 bits
    dropped = min(round(p * values), values - 1)
    return words.view(dtype)[:count].view(x.shape), dropped - values // 2, values / (values - dropped)


def keep(x: Tensor, random: Tensor, threshold: int) -> Tensor:
    """`x`, with 0 where it is dropped."""
    return torch.ge(random, threshold, out=torch.empty_like(x)).mul_(x)  # x * bool takes three times as long


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, p: float) -> Tensor:
        random, ctx.threshold, ctx.factor = draw(x, p)
        ctx.save_for_backward(random)
        return keep(x, random, ctx.threshold).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (random,) = ctx.saved_tensors
        return keep(gradient, random, ctx.threshold).mul_(ctx.factor), None


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and on_cpu(x):
            return _Dropout.apply(x, self.p)
        return super().forward(x)


class _CausalAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)), dropout, times v: in blocks of t queries and the s keys up to the block's last. The
    backward pass needs the probabilities (B * H, t, s), and random bytes of the same shape."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        shape, (T, D) = q.shape, q.shape[2:]
        q, k, v = (x.reshape(-1, T, D) for x in (q, k, v))  # (B * H, T, D)
        out, blocks = torch.empty_like(q), []
        future = q.new_full((min(BLOCK, T),) * 2, -math.inf).triu_(1)
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            t, rows = end - start, slice(start, end)
            scores = q.new_empty(len(q), t, end).baddbmm_(q[:, rows], k[:, :end].mT, beta=0, alpha=D**-0.5)
            scores[..., rows] += future[:t, :t]
            probabilities = torch.softmax(scores, dim=-1, out=scores)
            random, ctx.threshold, ctx.factor = draw(scores, dropout)
            dropped = keep(probabilities, random, ctx.threshold)
            out[:, rows].baddbmm_(dropped, v[:, :end], beta=0, alpha=ctx.factor)
            blocks += probabilities, random
        ctx.save_for_backward(q, k, v, *blocks)
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *blocks = ctx.saved_tensors
        T, D = q.shape[1:]
        d_out, (dq, dk, dv) = gradient.reshape(q.shape), (torch.empty_like(x) for x in (q, k, v))
        for start in reversed(range(0, T, BLOCK)):
            random, probabilities = blocks.pop(), blocks.pop()
            end = probabilities.shape[-1]
            rows, more = slice(start, end), int(end < T)  # the last block is the first to write into all of dk and dv
            dropped = keep(probabilities, random, ctx.threshold)
            dv[:, :end].baddbmm_(dropped.mT, d_out[:, rows], beta=more, alpha=ctx.factor)
            d_scores = torch.empty_like(dropped)
            d_scores.baddbmm_(d_out[:, rows], v[:, :end].mT, beta=0, alpha=ctx.factor).mul_(dropped)
            d_scores.addcmul_(probabilities, d_scores.sum(-1, keepdim=True), value=-1)
            dq[:, rows].baddbmm_(d_scores, k[:, :end], beta=0, alpha=D**-0.5)
            dk[:, :end].baddbmm_(d_scores.mT, q[:, rows], beta=more, alpha=D**-0.5)
        return *(x.view(gradient.shape) for x in (dq, dk, dv)), None


def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, causal: bool = True) -> Tensor:
    """Scaled dot-product attention of q (B, H, T, D) and k, v (B, H, S, D) -> (B, H, T, D), where S > T only if not causal
    or without dropout."""
    if q.dtype == torch.bfloat16 and torch.is_grad_enabled() and on_cpu(q):
        with torch.autocast("cpu", enabled=False):  # torch's backward pass in bfloat16 takes up to seven times as long
            return attention(q.float(), k.float(), v.float(), dropout=dropout, causal=causal).to(q.dtype)
    if causal and 0 < dropout < 1 and q.shape == k.shape and on_cpu(q):
        return _CausalAttention.apply(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
