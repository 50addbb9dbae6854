"""One optimizer step and one validation: gradients, masks, precision, clipping, metrics."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gptlab.metrics import TokenMetrics
from gptlab.model import GPT
from gptlab.module import GPTModule

OPTIM = {"lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_steps": 2, "decay_steps": 10, "weight_decay": 0.1,
         "betas": [0.9, 0.99], "grad_clip": 1.0, "skip_nonfinite": 0, "cooldown": 1.0}  # fmt: skip
VOCAB, T = 11, 6


def make_module(micro_batch_size=None, dropout=0.0, **optim) -> GPTModule:
    torch.manual_seed(0)
    model = GPT(vocab_size=VOCAB, block_size=T, n_layer=2, n_head=2, n_embd=8, dropout=dropout)
    return GPTModule(
        model, optim_config={**OPTIM, **optim}, token_bytes=np.ones(VOCAB, dtype=np.int64), seed=1,
        micro_batch_size=micro_batch_size, log_every=1, metadata={"data": {}, "tokenizer": {}},
    )  # fmt: skip


def make_trainer(folder, max_steps=1, **settings) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        **settings,
    }
    return L.Trainer(default_root_dir=folder, max_steps=max_steps, max_epochs=-1, enable_progress_bar=False,
                     enable_model_summary=False, **settings)  # fmt: skip


def batches(count=1, size=12, masked=False):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        ids = torch.randint(0, VOCAB, (size, T + 1), generator=generator)
        yield (ids, torch.rand(size, T + 1, generator=generator) < 0.4) if masked else ids


def fit(module, folder, data, **settings):
    data = list(data)
    make_trainer(folder, max_steps=len(data), **settings).fit(module, DataLoader(data, batch_size=None))
    return module


class Gradients(GPTModule):
    """Keeps each step's gradients as they are after clipping."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.seen = {name: p.grad.clone() for name, p in self.model.named_parameters()}


def gradients(folder, batch, **settings):
    module = make_module(grad_clip=0.0, **settings)
    module.__class__ = Gradients
    return fit(module, folder, [batch]).seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 100])
def test_micro_batches_give_the_gradients_of_one_batch(tmp_path, masked, micro_batch_size):
    """The reference is plain autograd over the whole batch. Dividing each micro-batch by its own tokens, the slip this
    guards against, is off by far more than 1e-6 for uneven masks and for 5 + 5 + 2 sequences."""
    batch = next(batches(masked=masked))
    ids, mask = batch if masked else (batch, torch.ones_like(batch, dtype=torch.bool))
    model = make_module().model
    losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    losses[mask[:, 1:]].mean().backward()
    seen = gradients(tmp_path, batch, micro_batch_size=micro_batch_size)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_micro_batch_without_counted_tokens_changes_nothing(tmp_path):
    ids, mask = next(batches(masked=True))
    mask[:3] = False
    seen = gradients(tmp_path, (ids, mask), micro_batch_size=3)
    expected = gradients(tmp_path, (ids[3:], mask[3:]))
    for name in seen:
        torch.testing.assert_close(seen[name], expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
def test_clipping_in_every_precision(tmp_path, precision):
    """The norm after clipping is the limit. In fp16 the gradients are scaled by 65536 until just before the step: clipped
    too early, they would end at 0.05 / 65536; and a fused step would unscale them afterwards."""
    settings = {"precision": precision}
    if precision == "fp16":  # Lightning offers it on GPUs only; the same plugin runs here with a scaler for CPUs
        settings = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    module = make_module(grad_clip=0.05)
    module.__class__ = Gradients
    fit(module, tmp_path, batches(), **settings)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in module.seen.values()]))
    assert norm.item() == pytest.approx(0.05, rel=1e-3)
    assert module.logged["train/clipped_share"] == 1.0
    optimizer = module.optimizers().optimizer
    assert optimizer.defaults["fused"] == (precision != "fp16")
    assert all(
        t.dtype == torch.float32 for state in optimizer.state.values() for t in (state["exp_avg"], *module.parameters())
    )
    unclipped = gradients(tmp_path, next(batches()))
    true_norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in unclipped.values()]))
    assert module.logged["train/grad_norm"] == pytest.approx(true_norm.item(), rel=0.02)


def test_overflow_in_fp16_skips_the_update_and_counts_the_step(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**60))
    module = make_module()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    fit(module, tmp_path, batches(), plugins=[plugin])
    assert module.trainer.global_step == 1
    assert all(torch.equal(before[name], p) for name, p in module.model.named_parameters())


def test_steps_follow_an_independent_loop(tmp_path):
    """Five steps against AdamW, clipping and schedule written out here."""
    module = fit(make_module(micro_batch_size=5), tmp_path, batches(5))
    model = make_module().model
    decay = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    for step, ids in enumerate(batches(5)):
        lr = 1e-3 * (step + 1) / 3 if step < 2 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * (step - 2) / 8))
        for group in adamw.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    for (name, ours), theirs in zip(module.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=name)
    assert module.logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert module.logged["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert module.logged["train/lr"] == pytest.approx(lr)


def test_dropout_depends_on_seed_and_step_not_on_what_ran_before(tmp_path):
    first = fit(make_module(dropout=0.5), tmp_path, batches(2))
    module = make_module(dropout=0.5)
    torch.rand(1000)  # somebody else uses the global generator
    second = fit(module, tmp_path, batches(2))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_token_metrics_by_hand():
    """2 batches, 3 tokens of 1, 2 and 4 bytes, 7 nats: loss 7/3, 7 / ln 2 bits over 7 bytes."""
    metrics = TokenMetrics()
    metrics.update(torch.tensor(3.0), torch.tensor(1), torch.tensor(1))
    metrics.update(torch.tensor(4.0), torch.tensor(2), torch.tensor(6))
    assert metrics.compute() == {
        "loss": pytest.approx(7 / 3),
        "perplexity": pytest.approx(math.exp(7 / 3)),
        "bits_per_byte": pytest.approx(1 / math.log(2)),
    }


def test_validation_counts_masked_tokens_and_their_bytes(tmp_path):
    module = make_module()
    module.token_bytes = torch.arange(VOCAB) + 1
    data = list(batches(3, masked=True))
    make_trainer(tmp_path).validate(module, DataLoader(data, batch_size=None), verbose=False)
    nats = tokens = text_bytes = 0
    for ids, mask in data:
        losses = F.cross_entropy(module.model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        nats += losses[mask[:, 1:]].sum().item()
        tokens += mask[:, 1:].sum().item()
        text_bytes += (ids[:, 1:][mask[:, 1:]] + 1).sum().item()
    assert module.validated["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert module.validated["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_validation_runs_at_the_start_every_so_often_and_at_the_end(tmp_path):
    seen = []

    class Notes(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.global_step)

    data = DataLoader(list(batches(11)), batch_size=None)
    trainer = make_trainer(
        tmp_path, 11, callbacks=[Notes()], val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=-1
    )
    trainer.fit(make_module(), data, data)
    assert seen == [0, 4, 8, 11]
