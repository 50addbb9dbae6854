"""The LightningModule: what one optimizer step and one validation are.

One Lightning batch is one optimizer step (manual optimisation), so Lightning's step, the schedule, the logs and the
position in the data are one number. A batch is token ids (b, T + 1), or (ids, mask) with a mask of the same shape that
is False on tokens which do not count as targets; the shift by one happens here and nowhere else.
"""

import contextlib
import itertools
import math
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from gptlab import optim

Batch = Tensor | tuple[Tensor, Tensor]


class TokenMetrics(Metric):
    """Loss per token, perplexity and bits per byte over all counted tokens, whatever the batches and processes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor, text_bytes: Tensor) -> None:
        self.nats += nats
        self.tokens += tokens
        self.bytes += text_bytes

    def compute(self) -> dict[str, float]:
        nats, tokens, text_bytes = self.nats.item(), self.tokens.item(), self.bytes.item()
        loss = nats / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # beyond that a float overflows
            "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.inf,
        }


@torch.no_grad()
def check_model(model: nn.Module, vocab_size: int, block_size: int) -> None:
    """Whether a user's own model offers what GPTModule's docstring asks for, by trying it on a few tokens.

    Raises:
        ValueError: the text says what is missing or wrong; that it looks ahead would otherwise show as a loss near 0.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module) or not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model._target_: {name} must be a torch.nn.Module with parameters to train")
    for key, value in (("vocab_size", vocab_size), ("block_size", block_size)):
        if getattr(model, key, None) != value:
            raise ValueError(f"model._target_: {name} must keep its argument {key}={value} as the attribute {key}")
    T = min(block_size, 128)
    ids = torch.arange(2 * T).view(2, T) % vocab_size
    changed = (ids + 1) % vocab_size  # all of the second sequence, but of the first
    changed[0, :-1] = ids[0, :-1]  # the last token alone
    was_training = model.training
    logits, others = model.eval()(ids), model(changed)
    model.train(was_training)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if (
        not isinstance(logits, Tensor)
        or logits.dim() != 3
        or logits.shape[:2] != ids.shape
        or logits.shape[2] < vocab_size
    ):
        raise ValueError(
            f"model._target_: {name} must map ids (B, T) to logits (B, T, V) with V >= vocab_size: for ids (2, {T}) and "
            f"vocab_size={vocab_size} it returned {shape}"
        )
    if not torch.isfinite(logits[..., :vocab_size]).all():
        raise ValueError(f"model._target_: {name} returns logits that are not finite, before any training")
    if not torch.allclose(logits[0, :-1, :vocab_size], others[0, :-1, :vocab_size], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"model._target_: {name} looks ahead: its logits for a position change with later tokens, which it is to "
            "predict, or with other sequences; mask them, as is_causal=True does in scaled_dot_product_attention"
        )


class GPTModule(L.LightningModule):
    """Trains a model, gptlab's or one of a user's own, on a data set such as `gptlab.data.windows.WindowData`.

    All that is asked of a model: it is a torch module, built with the keyword arguments `vocab_size` and `block_size`
    (the data's) and the keys of its config (but `_target_`, and `compile`, which has it compiled); it keeps those two
    as attributes; and it maps ids (B, T) int64, 1 <= T <= block_size, to logits (B, T, V), V >= vocab_size, of the
    token after each position, from the tokens up to that position alone (`check_model` tries that before training). A `flops_per_token()`, of forward and backward, is used for train/mfu if it is there.

    Args:
        optim_config: the keys of `conf/optim`.
        token_bytes: bytes of text per token (vocab_size,), for bits per byte.
        micro_batch_size: sequences per forward pass; None: the process's whole share at once.
        log_every: optimizer steps between two lines of training metrics.
        record: what a checkpoint says besides the weights: config, tokenizer, data; plain values.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optim_config: dict[str, Any],
        token_bytes: np.ndarray,
        seed: int,
        micro_batch_size: int | None,
        log_every: int,
        record: dict[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optim_config, self.seed, self.record = optim_config, seed, record
        self.micro_batch_size, self.log_every = micro_batch_size, log_every
        self.register_buffer("token_bytes", torch.from_numpy(token_bytes), persistent=False)
        # Since the last log: this process's part of the loss (times the number of processes), gradient norms,
        # clipped steps, steps. The mean over the processes is what is logged, and what a checkpoint keeps.
        self.register_buffer("interval", torch.zeros(4), persistent=False)
        self.val_metrics = TokenMetrics()
        self.measured: dict[str, float] = {}  # what callbacks measure in a validation, to be logged with its loss
        self.logged: dict[str, float] = {}  # the newest value of every metric
        self.validated: dict[str, float] = {}  # step and val/... of the newest validation
        self.best: dict[str, float] = {}  # and of the one with the lowest loss after a training step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        c = self.optim_config
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        return optim.adamw(self.model, lr=c["lr"], betas=tuple(c["betas"]), weight_decay=c["weight_decay"], fused=fused)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step  # finished ones
        seed = np.random.SeedSequence([self.seed, step, self.global_rank]).generate_state(1, np.uint64)
        self._seed_dropout(int(seed[0] >> np.uint64(1)))
        optimizer, lr = self.optimizers(), self._learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = self.accumulate_gradients(batch)
        with torch.autocast(self.device.type, enabled=False):
            optimizer.step()  # clips on the way, in on_before_optimizer_step
        optimizer.zero_grad(set_to_none=True)
        self.interval[0] += loss
        self.interval[3] += 1
        if step + 1 == self.trainer.max_steps:
            self.trainer.should_stop = True  # has Lightning validate after the last step, whatever val_every
        if (step + 1) % self.log_every == 0 or self.trainer.should_stop:
            self._log_interval(lr)  # here and not in a later hook: callbacks may save a checkpoint there

    def _seed_dropout(self, seed: int) -> None:
        """Dropout depends on nothing but run, step and process. (torch.manual_seed would record a stack trace for
        each kind of device that is not in use yet, at every step: 0.4 ms, and never freed.)"""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _learning_rate(self, step: int) -> float:
        keys = ("schedule", "lr", "min_lr", "warmup_steps", "decay_steps")
        return optim.learning_rate(step, **{key: self.optim_config[key] for key in keys})

    def accumulate_gradients(self, batch: Batch) -> Tensor:
        """Add the gradients of the mean loss over the *global* batch's counted tokens to the parameters, one
        micro-batch at a time. The returned mean over the processes is that loss, in nats per token."""
        ids, mask = batch if isinstance(batch, (tuple, list)) else (batch, None)
        weight = self.trainer.world_size / self._counted_tokens(ids, mask)  # DDP averages over the processes
        size = self.micro_batch_size or len(ids)
        masks = itertools.repeat(None) if mask is None else mask.split(size)
        micro_batches = list(zip(ids.split(size), masks, strict=False))
        total = torch.zeros((), device=self.device)
        for i, (micro_ids, micro_mask) in enumerate(micro_batches):
            loss = self.nats(micro_ids, micro_mask) * weight
            last = i + 1 == len(micro_batches)
            with self._sync_gradients(last), torch.autocast(self.device.type, enabled=False):
                self.manual_backward(loss)
            total += loss.detach()
        return total

    def _counted_tokens(self, ids: Tensor, mask: Tensor | None) -> int | Tensor:
        """How many tokens of the global batch count as targets (at least 1)."""
        tokens = ids[:, 1:].numel() if mask is None else mask[:, 1:].sum()
        if self.trainer.world_size > 1:
            tokens = self.trainer.strategy.reduce(torch.as_tensor(tokens, device=self.device), reduce_op="sum")
        return tokens.clamp(min=1) if isinstance(tokens, Tensor) else tokens

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Under DDP, leave the all-reduce of gradients to the last micro-batch."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if last or block is None else block()

    def nats(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The summed loss, in nats, of predicting each counted token of ids (b, T + 1) from those before it."""
        logits, targets = self.model(ids[:, :-1]), ids[:, 1:]
        if mask is not None:
            targets = targets.masked_fill(~mask[:, 1:], -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Here, not in training_step: only now are fp16 gradients unscaled.
        limit = self.optim_config["grad_clip"]
        if limit:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.trainer.precision == "16-mixed":
            norm = norm.nan_to_num(0.0, 0.0, 0.0)  # an overflow is the scaler's business: it skips this update
        self.interval[1] += norm
        if limit:
            self.interval[2] += norm > limit

    def _log_interval(self, lr: float) -> None:
        loss, norm, clipped, steps = self._interval_mean().tolist()
        self.interval.zero_()
        self.log_metrics(
            {
                "train/loss": loss / steps,
                "train/lr": lr,
                "train/grad_norm": norm / steps,
                "train/clipped_share": clipped / steps,
            }
        )

    def _interval_mean(self) -> Tensor:
        return self.trainer.strategy.reduce(self.interval.clone(), reduce_op="mean")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        ids, mask = batch if isinstance(batch, (tuple, list)) else (batch, torch.ones_like(batch, dtype=torch.bool))
        counted = mask[:, 1:]
        text_bytes = (self.token_bytes[ids[:, 1:]] * counted).sum()
        self.val_metrics.update(self.nats(ids, mask), counted.sum(), text_bytes)

    def on_validation_epoch_end(self) -> None:
        metrics = {f"val/{name}": value for name, value in self.val_metrics.compute().items()} | self.measured
        self.val_metrics.reset()
        self.validated = {"step": self.trainer.global_step, **metrics}
        best = self.best.get("val/loss", math.nan)
        if not self.trainer.sanity_checking and (math.isnan(best) or metrics["val/loss"] < best):
            self.best = self.validated
        self.log_metrics(metrics)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """To every logger under the number of finished steps (Lightning's own x-axis lags by one at validations), and
        to Lightning for callbacks that monitor a metric."""
        self.logged.update(metrics)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.record, interval=self._interval_mean().cpu(), best=self.best, validated=self.validated)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.interval.copy_(checkpoint["interval"])
        self.best, self.validated = checkpoint["best"], checkpoint["validated"]
