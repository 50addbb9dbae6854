"""What moves the weights: which parameters decay, AdamW and Muon, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float, lr: float, lr_of: dict[str, float]) -> list[dict]:
    """Groups of parameters with `weight_decay` (matrices, embeddings included; not biases and norms) and `lr_scale`, their
    learning rate's ratio to `lr`, for those kinds that have one in `lr_of` ("embedding", "head", "block").

    Every trainable parameter is in exactly one of them; a tied one counts once. Groups without parameters are left out.
    """
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() >= 2
        kind = "embedding" if parameter in embeddings else "head" if "lm_head" in name else "block"
        kind = kind if is_matrix and kind in lr_of else "rest"
        options = {"weight_decay": weight_decay if is_matrix else 0.0, "lr_scale": lr_of.get(kind, lr) / lr}
        group = groups.setdefault((kind, is_matrix), {"params": [], "kind": kind, **options})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: -group["params"][0].dim())  # decaying ones first


def build(model: nn.Module, *, fused: bool, lr: float, betas: tuple[float, float], weight_decay: float,
          muon_lr: float | None = None, embedding_lr: float | None = None, head_lr: float | None = None,
          momentum: float = 0.95, newton_schulz_steps: int = 5, **_schedule: Any) -> torch.optim.AdamW:  # fmt: skip
    """The optimizer of a config's `optim` node: AdamW (Loshchilov & Hutter 2019), or with `muon_lr`, `Muon`.

    `fused` must be off where a gradient scaler is used: a fused step unscales the gradients itself, after they were
    clipped.
    """
    rates = {"block": muon_lr, "embedding": embedding_lr, "head": head_lr}
    groups = parameter_groups(model, weight_decay, lr, {kind: rate for kind, rate in rates.items() if rate})
    if muon_lr is None:
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    return Muon(groups, lr=lr, betas=betas, fused=fused, momentum=momentum, steps=newton_schulz_steps)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the matrices of groups of kind "block", AdamW for the others.

    A matrix moves along its gradient's momentum (Nesterov's), made nearly orthogonal by Newton-Schulz iterations: all its
    directions learn equally fast. Matrices of equal shape are handled as one batch.
    """

    def __init__(self, groups: list[dict], *, momentum: float, steps: int, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum, self.steps = momentum, steps

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        groups = self.param_groups
        for group in groups:
            if group["kind"] == "block":
                by_shape = {}
                for parameter in group["params"]:
                    if parameter.grad is not None:  # a step that is skipped has none
                        by_shape.setdefault(parameter.shape, []).append(parameter)
                for parameters in by_shape.values():
                    self._move(parameters, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if group["kind"] != "block"]
        super().step()
        self.param_groups = groups

    def _move(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """One step of matrices of the same shape."""
        gradients = torch.stack([p.grad for p in parameters])
        kept = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        average = torch.stack(kept).lerp_(gradients, 1 - self.momentum)
        moves = orthogonalize(gradients.lerp(average, self.momentum), self.steps)
        skipped = getattr(self, "found_inf", None)  # on the device, see skip_unless_finite
        for parameter, before, after, move in zip(parameters, kept, average, moves, strict=True):
            new = (parameter * (1 - lr * weight_decay)).sub_(move, alpha=lr)
            if skipped is not None:
                after, new = torch.where(skipped > 0, before, after), torch.where(skipped > 0, parameter, new)
            before.copy_(after)
            parameter.copy_(new)


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """(N, rows, columns) -> the same singular vectors, singular values near 1 (0.7 to 1.2 after 5 steps).

    A matrix with more rows than columns consists of square ones if its rows allow it: the queries, keys and values of
    attention, and as many parts of an MLP, which are unrelated. The quintic iteration is Jordan's.
    """
    N, rows, columns = matrices.shape
    if rows % columns == 0:
        matrices = matrices.view(-1, columns, columns)
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(3.4445 * wide, torch.baddbmm(-4.7750 * gram, gram, gram, beta=1, alpha=2.0315), wide)
    x = wide if x.shape[1] <= x.shape[2] else wide.mT
    return x.reshape(N, rows, columns)


def skip_unless_finite(optimizer: torch.optim.Optimizer, norm: Tensor, *, wait: bool) -> None:
    """Have the optimizer's next step leave weights and state as they are if the gradient norm is not finite.

    Without `wait`, a fused step reads that from the device (`found_inf`, which a gradient scaler also uses), so that the
    host need not wait for it; else the gradients are taken away.
    """
    if not wait:
        optimizer.found_inf = (~norm.isfinite()).float()
    elif not norm.isfinite():
        optimizer.zero_grad(set_to_none=True)


def learning_rate(
    step: int, *, schedule: str, lr: float, min_lr: float, warmup_steps: int, decay_steps: int, cooldown: float = 1.0
) -> float:
    """The learning rate of the update that follows `step` finished ones.

    Linear warm-up over `warmup_steps`; then constant, or down to `min_lr` at `decay_steps` and `min_lr` from there on:
    half a cosine (SGDR, Loshchilov & Hutter 2017, without restarts; the warm-up starts above 0 as nanoGPT's), or a line
    over the last `cooldown` of the steps (Haegele et al. 2024).
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    if step >= decay_steps:
        return min_lr
    if schedule == "linear":
        left = (decay_steps - step) / max(1, min(cooldown * decay_steps, decay_steps - warmup_steps))
        return min_lr + min(1.0, left) * (lr - min_lr)
    done = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (lr - min_lr)
