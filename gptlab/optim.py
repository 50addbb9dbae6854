"""What moves the weights: which parameters decay, AdamW and Muon, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float, lr: float, lr_of: dict[str, float]) -> list[dict]:
    """Groups of parameters: those that decay (matrices, embeddings included) and those that do not (biases and norms), and
    one per kind of matrix with a learning rate of its own in `lr_of`: "embedding", "head" or "block". Its ratio to `lr`
    is the group's `lr_scale`.

    Every trainable parameter is in exactly one of them; a tied one counts once. The head is what has "lm_head" in its name.
    """
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decay = {"params": [], "kind": "rest", "weight_decay": weight_decay, "lr_scale": 1.0}
    kinds = {kind: {**decay, "params": [], "kind": kind, "lr_scale": rate / lr} for kind, rate in lr_of.items()}
    no_decay = {**decay, "params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "embedding" if parameter in embeddings else "head" if "lm_head" in name else "block"
        if parameter.dim() < 2:
            no_decay["params"].append(parameter)
        else:
            kinds.get(kind if parameter.dim() == 2 else "rest", decay)["params"].append(parameter)
    return [decay, *(group for group in kinds.values() if group["params"]), no_decay]


def build(model: nn.Module, *, fused: bool, lr: float, betas: tuple[float, float], weight_decay: float,
          muon_lr: float | None = None, embedding_lr: float | None = None, head_lr: float | None = None,
          momentum: float = 0.95, newton_schulz_steps: int = 5, **_schedule: Any) -> torch.optim.AdamW:  # fmt: skip
    """The optimizer of a config's `optim` node: AdamW (Loshchilov & Hutter 2019), or with `muon_lr`, `Muon`.

    `fused` must be off where a gradient scaler is used: a fused step unscales the gradients itself, after they were
    clipped.

    Raises:
        ValueError: a learning rate is for a kind of matrices that the model lacks.
    """
    named = {"block": muon_lr, "embedding": embedding_lr, "head": head_lr}
    rates = {kind: rate for kind, rate in named.items() if rate is not None}
    groups = parameter_groups(model, weight_decay, lr, rates)
    if missing := rates.keys() - {group["kind"] for group in groups}:
        raise ValueError(f"a learning rate for matrices that the model lacks: {', '.join(sorted(missing))}")
    for group in groups:
        if group["kind"] == "block":
            group |= {"momentum": momentum, "steps": newton_schulz_steps}
    optimizer = Muon if muon_lr is not None else torch.optim.AdamW
    return optimizer(groups, lr=lr, betas=tuple(betas), fused=fused)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the matrices of groups of kind "block", AdamW for the others.

    A matrix moves along its gradient's momentum (Nesterov's), made nearly orthogonal by Newton-Schulz iterations: all its
    directions learn equally fast. Matrices of equal shape are handled as one batch.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's looks for its own state in every parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:  # Lightning's, which clips gradients
            with torch.enable_grad():
                closure()
        groups = self.param_groups
        for group in groups:
            if group["kind"] == "block":
                self._step_matrices(group)
        try:
            self.param_groups = [group for group in groups if group["kind"] != "block"]
            super().step()
        finally:
            self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:  # a step that is skipped has none
                by_shape.setdefault(parameter.shape, []).append(parameter)
                if parameter not in self.state:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        skipped = getattr(self, "found_inf", None)  # on the device, see skip_unless_finite
        for parameters in by_shape.values():
            gradients = torch.stack([p.grad for p in parameters])
            averages = torch.stack([self.state[p]["momentum"] for p in parameters])
            averages.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonalize(gradients.lerp_(averages, group["momentum"]), group["steps"])
            for parameter, average, update in zip(parameters, averages, updates, strict=True):
                new = (parameter * (1 - group["lr"] * group["weight_decay"])).sub_(update, alpha=group["lr"])
                for old, value in ((self.state[parameter]["momentum"], average), (parameter, new)):
                    old.copy_(value if skipped is None else torch.where(skipped > 0, old, value))


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
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
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
