"""The LightningModule: one optimizer step and one validation.

    batch (b, T + 1) -> micro-batches -> summed loss / tokens of the global batch -> gradients -> clip -> skip or step

One Lightning batch is one optimizer step (manual optimization), so Lightning's step, the schedule, the logs and the
position in the data are one number. A batch is token ids (b, T + 1), or (ids, mask) with a mask of the same shape that
is False on tokens that are no targets; the shift by one happens here and nowhere else.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from gptlab import optim
from gptlab.data.windows import Batch, ids_and_mask
from gptlab.errors import UserError
from gptlab.memory import LESS_MEMORY, out_of_memory
from gptlab.metrics import TokenMetrics
from gptlab.model import nats
from gptlab.watch import OVERFLOW, Watch

log = logging.getLogger(__name__)


class GPTModule(L.LightningModule):
    """Trains a model, gptlab's or a custom one (`gptlab.contracts.check_model`), on batches as described above."""

    def __init__(
        self,
        model: nn.Module,
        *,
        optim_config: dict[str, Any],  # the keys of conf/optim
        token_bytes: np.ndarray,  # bytes of text per token (vocab_size,), for bits per byte
        seed: int,
        micro_batch_size: int | None,  # sequences per forward pass; None: the process's whole share at once
        log_every: int,  # optimizer steps
        metadata: dict[str, Any],  # plain values for each checkpoint: config, tokenizer, data
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optim_config, self.seed, self.metadata = optim_config, seed, metadata
        self.log_every = log_every
        # In force, None: whole batches; and what the config asks for.
        self.micro_batch_sizes = {"asked": micro_batch_size, "training": micro_batch_size, "validation": None}
        self.checks_at_log = False  # for non-finite steps: on a GPU, where no step may wait for the host
        self.register_buffer("token_bytes", torch.from_numpy(token_bytes), persistent=False)
        # (loss, gradient norm) of each step since the last log, on the device. The loss is this process's part times the
        # number of processes, so that the mean over processes is the loss of the step.
        self.recent: list[Tensor] = []
        self.watch = Watch(optim_config["grad_clip"], optim_config["skip_nonfinite"])
        self.val_metrics = TokenMetrics()
        self.extra_val_metrics: dict[str, float] = {}  # from callbacks, logged with the validation loss
        self.logged: dict[str, float] = {}  # newest value of every metric
        self.validated: dict[str, float] = {}  # step and val/... of the newest validation
        self.best: dict[str, float] = {}  # the same of the lowest validation loss after step 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        fused = self.device.type in ("cpu", "cuda") and self.trainer.precision != "16-mixed"
        self.checks_at_log = self.device.type == "cuda"
        return optim.build(self.model, fused=fused, **self.optim_config)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step  # finished ones
        optimizer, lr = self.optimizers(), self._learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)  # runs of an older gptlab have none

        ids, mask = ids_and_mask(batch)
        loss = self._within_memory("training", ids, lambda size: self.accumulate_gradients(step, ids, mask, size))
        with torch.autocast(self.device.type, enabled=False):
            optimizer.step()  # clips on the way, in on_before_optimizer_step
        optimizer.zero_grad(set_to_none=True)
        self.recent.append(torch.stack((loss, self.gradient_norm)))
        if step + 1 == self.trainer.max_steps:
            self.trainer.should_stop = True  # makes Lightning validate after the last step, whatever val_every
        log_due = (step + 1) % self.log_every == 0 or self.trainer.should_stop
        if log_due or not (self.checks_at_log or self.gradient_norm.isfinite()):
            rows = self._recent_mean().tolist()  # on a GPU, this waits for it
            self.watch.look(step + 1, rows)
            if log_due:  # here and not in a later hook: callbacks may save a checkpoint there
                self.recent = []
                self.log_metrics({"train/lr": lr, **self.watch.interval(rows)})

    def _within_memory(self, what: str, ids: Tensor, compute: Callable[[int], Tensor]) -> Tensor:
        """`compute(micro_batch_size)`, again with half the size, for good, when out of memory. UserError where one
        sequence does not fit, or with several processes, which would have to agree."""
        while True:
            size = min(self.micro_batch_sizes[what] or len(ids), len(ids))
            try:
                return compute(size)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Not in the except block, where the exception still holds the tensors of the frames it came through.
            if size == 1:
                raise UserError(f"out of memory in {what} with a single sequence: {LESS_MEMORY}")
            half, fault = (size + 1) // 2, f"out of memory in {what} with {size} sequences at a time"
            if self.trainer.world_size > 1:
                raise UserError(f"{fault}: add data.micro_batch_size={half}")
            log.warning("%s: continuing with %d", fault, half)
            self.zero_grad(set_to_none=True)
            if self.device.type != "cpu":
                torch.accelerator.empty_cache()
            self.micro_batch_sizes[what] = half

    def _seed_dropout(self, step: int) -> None:
        """Make dropout depend on seed, step and process alone."""
        words = np.random.SeedSequence([self.seed, step, self.global_rank]).generate_state(1, np.uint64)
        seed = int(words[0] >> np.uint64(1))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.4 ms and memory that is never freed
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _learning_rate(self, step: int) -> float:
        keys = ("schedule", "lr", "min_lr", "warmup_steps", "decay_steps", "cooldown")
        return optim.learning_rate(step, **{key: self.optim_config[key] for key in keys})

    def accumulate_gradients(self, step: int, ids: Tensor, mask: Tensor | None, size: int) -> Tensor:
        """Add the gradients of the mean loss over the *global* batch's counted tokens, `size` sequences at a time.

        A non-finite loss makes all gradients non-finite, in every process: their norm alone tells.

        Returns:
            This process's part; its mean over the processes is the loss in nats per token.
        """
        self._seed_dropout(step)
        tokens = ids[:, 1:].numel() if mask is None else mask[:, 1:].sum()
        if self.trainer.world_size > 1:
            tokens = self.trainer.strategy.reduce(torch.as_tensor(tokens, device=self.device), reduce_op="sum")
        tokens = tokens.clamp(min=1) if isinstance(tokens, Tensor) else tokens
        weight = self.trainer.world_size / tokens  # DDP averages over the processes
        masks = itertools.repeat(None) if mask is None else mask.split(size)
        micro_batches = list(zip(ids.split(size), masks, strict=False))
        total = torch.zeros((), device=self.device)
        for i, (micro_ids, micro_mask) in enumerate(micro_batches):
            nats = self.nats(micro_ids, micro_mask)
            loss = nats * torch.where(nats.isfinite(), weight, math.nan)  # an infinite loss can have finite gradients
            last = i + 1 == len(micro_batches)
            with self.sync_gradients(last), torch.autocast(self.device.type, enabled=False):
                self.manual_backward(loss)
            total += nats.detach() * weight
        return total

    def sync_gradients(self, last: bool) -> contextlib.AbstractContextManager:
        """Around the backward pass of a micro-batch: with the last one alone, the processes add up their gradients."""
        block_sync = getattr(self.trainer.strategy, "block_backward_sync", contextlib.nullcontext)  # DDP has it
        return contextlib.nullcontext() if last else block_sync()

    def nats(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Summed loss, in nats, of predicting each counted token of ids (b, T + 1) from those before it."""
        return nats(self.model, ids, mask)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Not in training_step, where fp16 gradients are still scaled.
        self.gradient_norm = self.clip_gradients(self.optim_config["grad_clip"])
        if self.trainer.precision == "16-mixed":  # the gradient scaler skips such steps itself
            self.gradient_norm = self.gradient_norm.nan_to_num(OVERFLOW, OVERFLOW, OVERFLOW)
        else:
            optim.skip_unless_finite(optimizer, self.gradient_norm, wait=not self.checks_at_log)

    def clip_gradients(self, limit: float) -> Tensor:
        """Their norm before that. A limit of 0 is none."""
        if limit == 0:
            return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def _recent_mean(self) -> Tensor:
        """(loss, gradient norm) of each step since the last log, (steps, 2)."""
        if not self.recent:
            return torch.zeros(0, 2)
        return self.trainer.strategy.reduce(torch.stack(self.recent), reduce_op="mean")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        ids, mask = ids_and_mask(batch)
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

        def summed_nats(size: int) -> Tensor:
            return sum(self.nats(*part) for part in zip(ids.split(size), mask.split(size), strict=True))

        nats, counted = self._within_memory("validation", ids, summed_nats), mask[:, 1:]
        self.val_metrics.update(nats, counted.sum(), (self.token_bytes[ids[:, 1:]] * counted).sum())

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()

    def on_validation_epoch_end(self) -> None:
        metrics = {f"val/{name}": value for name, value in self.val_metrics.compute().items()} | self.extra_val_metrics
        self.validated = {"step": self.trainer.global_step, **metrics}
        best = self.best.get("val/loss", math.nan)
        if not self.trainer.sanity_checking and (math.isnan(best) or metrics["val/loss"] < best):
            self.best = self.validated
        self.log_metrics(metrics)

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log to every logger, at the number of finished steps (Lightning's own x-axis lags by one at validations), and
        offer the metrics to callbacks that monitor one."""
        self.logged.update(metrics)
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(
            self.metadata,
            recent=self._recent_mean().cpu(),
            watch=self.watch.state(),
            best=self.best,
            validated=self.validated,
            micro_batch_size=self.micro_batch_sizes,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.recent = list(checkpoint["recent"].to(self.device))
        self.watch.load(checkpoint["watch"])
        self.best, self.validated = checkpoint["best"], checkpoint["validated"]
        if (
            checkpoint["micro_batch_size"]["asked"] == self.micro_batch_sizes["asked"]
        ):  # else the user asks for another now
            self.micro_batch_sizes = checkpoint["micro_batch_size"]
