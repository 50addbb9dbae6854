"""Steps whose loss or gradients are not finite, and steps for which the memory does not suffice."""

import logging
import math
from pathlib import Path

import pytest
import torch
from conftest import DROPOUT, TINY, metrics, same, weights
from test_module import T, batches, fit, make_module, make_trainer
from torch.utils.data import DataLoader

from gptlab import config, optim
from gptlab.memory import out_of_memory
from gptlab.module import GPTModule
from gptlab.run import Run
from gptlab.train import make_data
from gptlab.watch import Diverged


@pytest.fixture
def train(gptlab):
    """Train with callbacks of disturb.py."""
    here = str(Path(__file__).parent)
    return lambda *arguments, status=0: gptlab("train", *arguments, status=status, PYTHONPATH=here)


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
    optimizer = optim.build(module.model, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
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


@pytest.mark.parametrize(
    ("kind", "log_every", "end", "taken"), [(Poisoned, 100, 3, [0, 1]), (OnDevice, 5, 5, [0, 1, 3, 4])]
)
def test_a_run_ends_with_the_very_step_on_a_device_with_the_next_log(tmp_path, kind, log_every, end, taken):
    """There, the steps in between start from weights that are good."""
    module = poisoned(kind)
    module.log_every = log_every
    with pytest.raises(Diverged, match=r"diverged: step 3: the loss is nan"):
        fit(module, tmp_path, batches(6))
    assert module.trainer.global_step == end
    expected = after(taken)
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


def test_weights_that_blow_up(train, gptlab, tmp_path):
    """The first update is finite and absurd. The validation after it says so, and nothing samples from such weights. The
    batch that the text names by its index is the one that the run saw last."""
    blown = ["optim.lr=1e30", "optim.warmup_steps=0", "optim.grad_clip=0", "trainer.val_every=1"]
    said = train(*TINY, *blown, "+callbacks.record._target_=disturb.Record", "hydra.run.dir=run", status=1).stdout
    assert "no sample: the validation loss is not finite" in said
    assert "ERROR: the run has diverged: step 2: the loss is nan" in said and "data.train_steps(0, 1)[1]" in said
    assert "at step 2; the last checkpoint is of step 1" in said and "resume=run" in said and "Traceback" not in said
    assert not (tmp_path / "run/summary.json").exists()
    cfg = config.validate({**Run(tmp_path / "run").read_config(), "trust": False}, "train")
    data = make_data(cfg.data, cfg.seed)
    assert torch.equal(data.train_steps(0, 1)[1], torch.load(tmp_path / "batch.pt", weights_only=True))
    assert [line["val/loss"] for line in metrics(tmp_path / "run") if "val/loss" in line][1] is None
    assert "diverged: step 2: the loss is nan" in train("resume=run", "trust=true", status=1).stdout
    assert "its weights are not finite, or huge" in gptlab("sample", "ckpt=run", status=2).stderr


@pytest.mark.slow
def test_all_processes_leave_out_what_is_not_finite_in_one(train, tmp_path):
    """Their weights would differ; and the command that is printed resumes without that update."""
    poison = ["+callbacks.poison._target_=disturb.Poison", "+callbacks.poison.at=3", "+callbacks.poison.rank=1"]
    done = train(*TINY, "trainer.devices=2", *poison, "hydra.run.dir=run", status=1)
    assert "step 3: the loss is nan and the gradient norm nan" in done.stdout and done.stderr == ""
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    command = "resume=run trust=true optim.skip_nonfinite=1"
    assert f"to skip its update and resume:\n  python -m gptlab.train {command}\n" in done.stdout
    train(*command.split())
    assert Run(tmp_path / "run").read_summary()["steps"] == 4
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


# --- out of memory

# Long enough for validations of several batches, too.
LONG = [*DROPOUT, "data.micro_batch_size=null", "trainer.max_steps=8", "hydra.run.dir=run"]


def scarce(room: int) -> list[str]:
    return ["+callbacks.scarce._target_=disturb.Scarce", f"+callbacks.scarce.room={room}"]


def test_the_micro_batch_is_halved_until_it_fits(train, tmp_path):
    """12 sequences, then 6, then 3: and the weights are bitwise those of a run with micro-batches of 3 from the start,
    dropout and all. What is in force is saved: a resume does not try again, and a size that is asked for wins."""
    said = train(*LONG, *scarce(4)).stdout
    assert "out of memory in training with 12 sequences at a time: continuing with 6" in said
    assert "out of memory in training with 6 sequences at a time: continuing with 3" in said
    assert "out of memory in validation with 20 sequences at a time" in said
    train(*LONG, "data.micro_batch_size=3", "hydra.run.dir=small")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "small"))
    losses = [[line.get("train/loss") for line in metrics(tmp_path / run)] for run in ("run", "small")]
    assert losses[0] == losses[1]
    resume = ["resume=run", "trust=true"]
    assert "out of memory" not in train(*resume, "trainer.max_steps=9").stdout
    said = train(*resume, "trainer.max_steps=10", "data.micro_batch_size=8").stdout
    assert "out of memory in training with 8 sequences at a time: continuing with 4" in said


def test_a_single_sequence_that_does_not_fit_is_a_user_error(train):
    stderr = train(*LONG, *scarce(0), status=2).stderr
    assert "model.activation_checkpointing=true" in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_several_processes_are_told_the_size_to_use(train, tmp_path):
    """They would have to agree on it. 12 sequences are 6 for each; 3 do fit."""
    done = train(*LONG, *scarce(5), "trainer.devices=2", "data.val_windows=2", status=2)
    assert "add data.micro_batch_size=3" in done.stderr
    train("resume=run", "trust=true", "data.micro_batch_size=3")
    assert Run(tmp_path / "run").read_summary()["steps"] == 8


def test_errors_on_a_cpu_are_told_apart_by_their_text(tmp_path):
    """torch's lack of memory there, really provoked, is a RuntimeError without a class of its own; another is passed on."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    module = make_module()
    module.model.register_forward_pre_hook(lambda model, ids: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        make_trainer(tmp_path).fit(module, DataLoader(list(batches()), batch_size=None))
