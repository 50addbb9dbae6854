"""Steps whose loss or gradients are not finite, and steps for which the memory does not suffice."""

import json
import logging
import math

import pytest
import torch
from conftest import DROPOUT, TINY, metrics, same, weights
from omegaconf import OmegaConf
from test_module import T, batches, fit, make_module, make_trainer
from torch.utils.data import DataLoader

from gptlab import optim
from gptlab.module import GPTModule
from gptlab.train import make_data
from gptlab.watch import Diverged


class Poisoned(GPTModule):
    """In the step with this index, the loss is not finite: its gradients are, or are not."""

    poison, at = math.nan, 2

    def nats(self, ids, mask):
        nats = super().nats(ids, mask)
        if self.trainer.global_step != self.at:
            return nats
        return nats * self.poison if math.isnan(self.poison) else nats + self.poison


class OnDevice(Poisoned):
    """As on a GPU: the update is masked without looking, and logs alone are looked at."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.checks_at_log = True
        return optimizer


def poisoned(kind=Poisoned, **changes) -> GPTModule:
    module = make_module(micro_batch_size=5, **changes)
    module.__class__ = kind
    return module


def after(steps: list[int]) -> dict[str, torch.Tensor]:
    """The weights of an untouched run that takes only these of the steps: AdamW's state and the schedule are as they
    would be if the others had not happened."""
    module = make_module(micro_batch_size=5)
    data = list(batches(6))
    optimizer = optim.adamw(module.model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = GPTModule._learning_rate(module, step)
        ids, total = data[step], 0
        for part in ids.split(5):
            nats = GPTModule.nats(module, part, None) / (len(ids) * T)
            nats.backward()
            total += nats.detach()
        torch.nn.utils.clip_grad_norm_(module.model.parameters(), module.optim_config["grad_clip"])
        optimizer.step()
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


@pytest.mark.parametrize("kind", [Poisoned, OnDevice])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path, caplog, poison, kind):
    """Step 3 of 6 is left out, as if it had not happened, but it counts. An infinite constant, whose gradients are
    finite, is the sly one."""
    module = poisoned(kind)
    module.poison, module.watch.may_skip, module.log_every = poison, 1, 3
    with caplog.at_level(logging.WARNING):
        fit(module, tmp_path, batches(6))
    expected = after([0, 1, 3, 4, 5])
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)
    assert module.trainer.global_step == 6 and module.watch.skipped == 1
    assert "step 3: the loss is" in caplog.text and "(1 of at most 1" in caplog.text
    states = module.optimizers().optimizer.state.values()
    assert {int(state["step"]) for state in states} == {5}
    assert math.isfinite(module.logged["train/loss"])


def test_on_a_cpu_the_run_ends_with_the_very_step(tmp_path):
    module = poisoned()
    module.log_every = 100
    with pytest.raises(Diverged, match=r"diverged: step 3: the loss is nan"):
        fit(module, tmp_path, batches(6))
    assert module.trainer.global_step == 3
    expected = after([0, 1])
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


def test_on_a_device_it_ends_with_the_next_log(tmp_path):
    """The steps in between go on from weights that are good."""
    module = poisoned(OnDevice)
    module.log_every = 5
    with pytest.raises(Diverged, match=r"diverged: step 3: the loss is nan"):
        fit(module, tmp_path, batches(6))
    assert module.trainer.global_step == 5
    expected = after([0, 1, 3, 4])
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


RECORD = """
import lightning as L, torch

class Record(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.save(batch, "batch.pt")
"""


def test_a_diverged_run_names_the_batch_and_how_to_go_on(gptlab, tmp_path):
    """The batch that the text names by its index is the one that the run saw last; the last checkpoint is good."""
    (tmp_path / "record.py").write_text(RECORD)
    blown = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.grad_clip=0", "trainer.checkpoint_every=1"]
    arguments = [*TINY, *blown, "trainer.val_every=100", "+callbacks.record._target_=record.Record"]
    said = gptlab("train", *arguments, "hydra.run.dir=run", status=1, PYTHONPATH=str(tmp_path)).stdout
    assert "ERROR: the run has diverged: step 2: the loss is nan" in said and "data.train_steps(0, 1)[1]" in said
    assert "at step 2; the last checkpoint is of step 1" in said and "resume=run" in said and "Traceback" not in said
    assert not (tmp_path / "run/summary.json").exists()
    data = make_data(OmegaConf.load(tmp_path / "run/config.yaml"), resuming=True)
    assert torch.equal(data.train_steps(0, 1)[1], torch.load(tmp_path / "batch.pt", weights_only=True))
    again = gptlab("train", "resume=run", status=1, PYTHONPATH=str(tmp_path)).stdout
    assert "diverged: step 2: the loss is nan" in again


def test_weights_that_blow_up_are_neither_sampled_nor_used(gptlab, tmp_path):
    """The first update is finite and absurd. The validation after it says so; the callback that samples does not crash,
    and sampling from the checkpoint is refused."""
    blown = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.grad_clip=0", "trainer.val_every=1"]
    said = gptlab("train", *TINY, *blown, "hydra.run.dir=run", status=1).stdout
    assert "no sample: the validation loss is not finite" in said and "has diverged: step 2" in said
    assert [line["val/loss"] for line in metrics(tmp_path / "run") if "val/loss" in line][1] is None
    assert "its weights are not finite, or huge" in gptlab("sample", "ckpt=run", status=2).stderr


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_job_that_diverged(gptlab, tmp_path):
    gptlab("train", "-m", *TINY, "optim.grad_clip=0", "optim.warmup_steps=0", "optim.lr=1e30,1e-3", status=1)
    (sweep,) = (tmp_path / "sweeps/python_docs").iterdir()
    assert not (sweep / "0/summary.json").exists() and (sweep / "1/summary.json").exists()


POISON = """
import lightning as L

class Poison(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            self.hook = module.model.register_forward_hook(lambda model, ids, logits: logits * float("nan"))

    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            self.hook.remove()
"""


@pytest.mark.parametrize("allowed", [0, 1])
def test_all_processes_leave_out_what_is_not_finite_in_one(gptlab, tmp_path, allowed):
    (tmp_path / "poison.py").write_text(POISON)
    arguments = [*TINY, "trainer.devices=2", "+callbacks.poison._target_=poison.Poison", "hydra.run.dir=run"]
    done = gptlab("train", *arguments, f"optim.skip_nonfinite={allowed}", status=1 - allowed, PYTHONPATH=str(tmp_path))
    assert "step 3: the loss is nan and the gradient norm nan" in done.stdout and done.stderr == ""
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())
    step = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step == (4 if allowed else 2)
    if not allowed:
        command = "resume=run optim.skip_nonfinite=1"
        assert f"to leave its update out and go on:\n  python -m gptlab.train {command}\n" in done.stdout
        gptlab("train", *command.split(), PYTHONPATH=str(tmp_path))
        assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4


# --- out of memory

SCARCE = """
import pathlib, lightning as L, torch

class Scarce(L.Callback):
    \"\"\"A device that has room for so many sequences at a time.\"\"\"
    def __init__(self, room):
        self.room = room

    def on_fit_start(self, trainer, module):
        def check(model, inputs):
            if len(inputs[0]) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        module.model.register_forward_pre_hook(check)
"""
# Long enough for validations of several batches, too.
LONG = [*DROPOUT, "data.micro_batch_size=null", "trainer.max_steps=8", "hydra.run.dir=run"]


def scarce(room: int) -> list[str]:
    return ["+callbacks.scarce._target_=scarce.Scarce", f"+callbacks.scarce.room={room}"]


@pytest.fixture
def short_of_memory(gptlab, tmp_path):
    (tmp_path / "scarce.py").write_text(SCARCE)

    def run(*arguments: str, status: int = 0):
        return gptlab("train", *arguments, status=status, PYTHONPATH=str(tmp_path))

    return run


def test_the_micro_batch_is_halved_until_it_fits(short_of_memory, tmp_path):
    """12 sequences, then 6, then 3: and the weights are bitwise those of a run with micro-batches of 3 from the start,
    dropout and all. What is in force is saved: a resume does not try again, and a size that is asked for wins."""
    said = short_of_memory(*LONG, *scarce(4)).stdout
    assert "out of memory in training with 12 sequences at a time: continuing with 6" in said
    assert "out of memory in training with 6 sequences at a time: continuing with 3" in said
    assert "out of memory in validation with 20 sequences at a time" in said
    short_of_memory(*LONG, "data.micro_batch_size=3", "hydra.run.dir=small")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "small"))
    assert [line["train/loss"] for line in metrics(tmp_path / "run") if "train/loss" in line] == [
        line["train/loss"] for line in metrics(tmp_path / "small") if "train/loss" in line
    ]
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["micro_batch_size"] == {"asked": None, "training": 3, "validation": 3}

    assert "out of memory" not in short_of_memory("resume=run", "trainer.max_steps=9").stdout
    said = short_of_memory("resume=run", "trainer.max_steps=10", "data.micro_batch_size=8").stdout
    assert "out of memory in training with 8 sequences at a time: continuing with 4" in said


def test_a_single_sequence_that_does_not_fit_is_a_mistake(short_of_memory):
    stderr = short_of_memory(*LONG, *scarce(0), status=2).stderr
    assert "model.activation_checkpointing=true" in stderr and "Traceback" not in stderr


def test_several_processes_are_told_the_size_to_use(short_of_memory, tmp_path):
    """They would have to agree on it. 12 sequences are 6 for each; 3 do fit."""
    done = short_of_memory(*LONG, *scarce(5), "trainer.devices=2", "data.val_windows=2", status=2)
    assert "add data.micro_batch_size=3" in done.stderr
    short_of_memory("resume=run", "data.micro_batch_size=3")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 8


def test_a_cpu_that_runs_out_of_memory_says_it_otherwise(tmp_path):
    """torch's text on a CPU, really provoked: it is a RuntimeError without a class of its own."""
    from gptlab.memory import out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    module = make_module()
    module.model.register_forward_pre_hook(lambda model, ids: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        make_trainer(tmp_path).fit(module, DataLoader(list(batches()), batch_size=None))
