"""What moves the weights: which parameters decay, AdamW, and the learning rate as a function of the step."""

import math

import torch
from torch import Tensor, nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices (embeddings included), which decay, and biases and norms, which do not.

    Every trainable parameter is in exactly one of them; a tied one counts once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019). `fused` must be off where a gradient scaler is used: a fused step unscales
    the gradients itself, after they were clipped."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=betas, fused=fused)


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor, *, wait: bool) -> None:
    """Have the optimizer's next step leave weights and state as they are if the gradient norm is not finite.

    Without `wait`, a fused step reads that from the device (`found_inf`, which a gradient scaler also uses), so that the
    host need not wait for it; else the gradients are taken away.
    """
    if not wait:
        optimizer.found_inf = (~norm.isfinite()).float()
    elif not norm.isfinite():
        optimizer.zero_grad(set_to_none=True)


def learning_rate(step: int, *, schedule: str, lr: float, min_lr: float, warmup_steps: int, decay_steps: int) -> float:
    """The learning rate of the update that follows `step` finished ones.

    Linear warm-up over `warmup_steps`; then constant, or half a cosine down to `min_lr` at `decay_steps` and
    `min_lr` from there on (SGDR, Loshchilov & Hutter 2017, without restarts; the warm-up starts above 0 as nanoGPT's).
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if step >= decay_steps:
        return min_lr
    done = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (lr - min_lr)
