"""The health of a run, from the loss and the gradient norm of each step: steps that are not finite, spikes, clipping."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

log = logging.getLogger(__name__)

OVERFLOW = -1.0  # in place of a norm: fp16 gradients were too large for their scale, which is the scaler's business
USUAL_STEPS = 50  # so many are needed before a loss can be called unusual
USUAL_DECAY = 0.98  # of the running mean and variance of the loss
SPIKE = 6.0  # standard deviations above the mean


class Diverged(Exception):
    """Training gives numbers that are not finite; `skipped` is how many steps would have to be left out so far."""

    def __init__(self, text: str, skipped: int) -> None:
        super().__init__(text)
        self.skipped = skipped


@dataclass
class Watch:
    """Looks at each step once, in order. What it has seen are plain numbers, which a checkpoint keeps."""

    grad_clip: float  # optim.grad_clip, 0: off
    may_skip: int  # optim.skip_nonfinite
    looked_at: int = 0  # the last step seen
    skipped: int = 0  # steps that were not finite
    steps: int = 0  # finite ones
    clipped: int = 0
    norm_sum: float = 0.0
    largest_norm: float = 0.0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    spike: float | None = None  # the highest since it was last set to None

    def look(self, last_step: int, rows: Sequence[Sequence[float]]) -> None:
        """Look at those of the steps up to `last_step` that are new, and say what is wrong with them.

        Args:
            rows: (loss, gradient norm before clipping) of the newest steps, the last of them that of `last_step`.

        Raises:
            Diverged: more steps were not finite than may be left out.
        """
        for step, (loss, norm) in enumerate(rows, last_step - len(rows) + 1):
            if step <= self.looked_at:
                continue
            self.looked_at = step
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._left_out(step, loss, norm)
                continue
            if self._is_spike(loss):
                log.warning("step %d: the loss jumped to %.4f, from about %.4f", step, loss, self.loss_mean)
                self.spike = max(loss, self.spike or loss)
            self.steps += 1
            if norm != OVERFLOW:
                self.clipped += 0 < self.grad_clip < norm
                self.norm_sum += norm
                self.largest_norm = max(self.largest_norm, norm)

    def _left_out(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        text = (
            f"step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}, so the update was left out. Its batch "
            f"is data.train_steps(0, 1)[{step - 1}]"
        )
        if self.skipped > self.may_skip:
            raise Diverged(
                f"the run has diverged: {text}. Mostly, optim.lr is too high: start a new run with a lower one. If it is "
                f"that batch, its update can be left out (optim.skip_nonfinite={self.may_skip}: so many, so far)",
                self.skipped,
            )
        log.warning("%s (%d of at most %d such steps)", text, self.skipped, self.may_skip)

    def interval(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """The metrics of the steps since the last log: means over those that were finite."""
        losses = [loss for loss, _ in rows if math.isfinite(loss)]
        norms = [norm for _, norm in rows if math.isfinite(norm) and norm != OVERFLOW]
        metrics = {
            "train/loss": sum(losses) / len(losses) if losses else math.nan,
            "train/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "train/clipped_share": sum(0 < self.grad_clip < norm for norm in norms) / len(rows),
        }
        if self.spike is not None:
            metrics["train/loss_spike"], self.spike = self.spike, None
        return metrics

    def _is_spike(self, loss: float) -> bool:
        """Whether the loss is far above the usual one, which then follows it by as much as a usual loss at most: after
        a jump that stays, only its first steps are spikes."""
        decay = USUAL_DECAY if self.steps >= USUAL_STEPS else self.steps / (self.steps + 1)
        limit = self.loss_mean + SPIKE * math.sqrt(self.loss_variance)
        spike = self.steps >= USUAL_STEPS and loss > limit
        away = min(loss, limit) - self.loss_mean if spike else loss - self.loss_mean
        self.loss_mean += (1 - decay) * away
        self.loss_variance = decay * (self.loss_variance + (1 - decay) * away**2)
        return spike

    def clipping_hint(self) -> str | None:
        """What to say about a limit of the gradient norm that is always or never reached; None if it does its work."""
        if not self.grad_clip or self.steps < USUAL_STEPS:
            return None
        share, mean = self.clipped / self.steps, self.norm_sum / self.steps
        if share > 0.99:
            return (
                f"gradient clipping was active in {share:.1%} of the steps: with optim.grad_clip={self.grad_clip:g} and a mean "
                f"gradient norm of {mean:.3g}, it sets the length of every update. To cut off outliers only, try "
                f"optim.grad_clip={_round(2 * mean)}"
            )
        if share == 0:
            return (
                f"gradient clipping was never active: optim.grad_clip={self.grad_clip:g}, and the largest gradient norm was "
                f"{self.largest_norm:.3g} (mean {mean:.3g}). To cut off outliers, try optim.grad_clip={_round(2 * mean)}"
            )
        return None

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("grad_clip", "may_skip")}

    def load(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])


def _round(value: float) -> str:
    """To one digit, and not as 2e+01."""
    return f"{float(f'{value:.1g}'):g}"
