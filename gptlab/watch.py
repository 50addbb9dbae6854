"""The health of a run, from the loss and gradient norm of each step: non-finite steps, spikes, clipping."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

log = logging.getLogger(__name__)

OVERFLOW = -1.0  # in place of a norm: fp16 gradients overflowed, which the gradient scaler handles
WARMUP_STEPS = 50  # before a loss can be called a spike
DECAY = 0.98  # of the running mean and variance of the loss
SPIKE = 6.0  # standard deviations above the mean


class Diverged(Exception):
    """More steps were not finite than may be skipped; `skipped` counts them, this one included."""

    def __init__(self, text: str, skipped: int) -> None:
        super().__init__(text)
        self.skipped = skipped


@dataclass
class Watch:
    """Looks at each step once, in order. Its state is plain numbers, kept in checkpoints."""

    grad_clip: float  # optim.grad_clip, 0: off
    may_skip: int  # optim.skip_nonfinite
    looked_at: int = 0  # the last step seen
    skipped: int = 0  # non-finite steps
    steps: int = 0  # finite steps
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    spike: float | None = None  # the highest since it was last set to None

    def look(self, last_step: int, rows: Sequence[Sequence[float]]) -> None:
        """Look at those of the newest steps that are new, and warn of what is wrong with them.

        Args:
            rows: (loss, gradient norm before clipping) of the steps up to `last_step`.

        Raises:
            Diverged: more steps were not finite than may be skipped.
        """
        for step, (loss, norm) in enumerate(rows, last_step - len(rows) + 1):
            if step <= self.looked_at:
                continue
            self.looked_at = step
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._skip(step, loss, norm)
            else:
                if self._is_spike(loss):
                    log.warning("step %d: the loss jumped to %.4f, from about %.4f", step, loss, self.loss_mean)
                    self.spike = max(loss, self.spike or loss)
                self.steps += 1

    def _skip(self, step: int, loss: float, norm: float) -> None:
        self.skipped += 1
        text = f"step {step}: the loss is {loss:.4g} and the gradient norm {norm:.4g}; the update was skipped"
        text += f". Its batch is data.train_steps(0, 1)[{step - 1}]"
        if self.skipped > self.may_skip:
            skip = f"optim.skip_nonfinite={self.skipped}"
            advice = f"start a new run with a lower optim.lr; if it is the batch, skip its update with {skip}"
            raise Diverged(f"the run has diverged: {text}. Usual remedy: {advice}", self.skipped)
        log.warning("%s (%d of at most %d such steps)", text, self.skipped, self.may_skip)

    def interval(self, rows: Sequence[Sequence[float]]) -> dict[str, float]:
        """Metrics of the steps since the last log: means over the finite ones."""
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
        """Whether the loss is far above the running mean. The mean follows a spike by a limited amount: of a jump that
        stays, only the first steps are spikes."""
        decay = DECAY if self.steps >= WARMUP_STEPS else self.steps / (self.steps + 1)
        limit = self.loss_mean + SPIKE * math.sqrt(self.loss_variance)
        spike = self.steps >= WARMUP_STEPS and loss > limit
        away = min(loss, limit) - self.loss_mean if spike else loss - self.loss_mean
        self.loss_mean += (1 - decay) * away
        self.loss_variance = decay * (self.loss_variance + (1 - decay) * away**2)
        return spike

    def state(self) -> dict[str, float | None]:
        return {name: value for name, value in asdict(self).items() if name not in ("grad_clip", "may_skip")}

    def load(self, state: dict[str, float | None]) -> None:
        for name in self.state():
            setattr(self, name, state[name])
