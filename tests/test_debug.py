"""debug=fast, overfit and profile; runs that end early; averaged weights."""

import contextlib
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from composed import composed
from conftest import TINY, assert_same_end, metrics, same, weights
from test_callbacks import Data
from test_module import make_module, make_trainer

from gptlab.callbacks.checkpointing import AtomicCheckpointIO, Checkpointing
from gptlab.callbacks.debug import Overfit, Profile
from gptlab.callbacks.ema import EMA


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def steps_of(run: Path, name: str) -> list[int]:
    return [line["step"] for line in metrics(run) if name in line]


def checkpoint(run: Path, name: str = "last") -> dict:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_fast_is_two_steps_of_any_experiment(gptlab, tmp_path):
    """It must win over the experiment's own numbers, and leave its model alone."""
    gptlab("train", "experiment=addition", "debug=fast", "hardware=cpu")
    (run,) = (tmp_path / "outputs/debug").iterdir()
    assert (summary_of(run)["steps"], summary_of(run)["ended"]) == (2, "max_steps")
    assert steps_of(run, "train/loss") == [1, 2] and steps_of(run, "val/loss") == [0, 1, 2]
    ours, theirs = (
        composed("train", "experiment=addition", "hardware=cpu", *more)[0] for more in ((), ("debug=fast",))
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == ours["model"] == theirs["model"]


def test_overfit_learns_one_batch_and_ends(gptlab, tmp_path):
    done = gptlab("train", "debug=overfit", "hardware=cpu", "model=gpt-nano", "optim.lr=3e-3", "hydra.run.dir=run")
    assert done.stderr == "" and done.stdout.count("one batch overfit: loss 0.0") == 1
    assert "trainer.max_steps=" not in done.stdout  # nothing to go on with
    run, end = tmp_path / "run", summary_of(tmp_path / "run")["steps"]
    assert end < 1000 and end % 10 == 0 and checkpoint(run)["global_step"] == end
    assert steps_of(run, "train/loss") == list(range(10, end + 1, 10)) and steps_of(run, "val/loss") == [0, end]
    losses = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    assert losses[-1] <= 0.05 < losses[-2]


class Batches(L.Callback):
    def __init__(self):
        self.seen, self.training = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch.clone())
        self.training.append(pl_module.model.training)


def test_overfit_sees_the_first_batch_in_each_step(tmp_path, caplog):
    """Also after a resume; and one that does not learn says what to look at."""
    folder = tmp_path / "checkpoints"
    free, first, resumed = Batches(), Batches(), Batches()
    make_trainer(tmp_path, 3, callbacks=[free], limit_val_batches=0).fit(make_module(), datamodule=Data())
    settings = {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()], "limit_val_batches": 0}
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, 3, callbacks=[first, Overfit(1e-9), Checkpointing(1)], **settings)
        trainer.fit(make_module(), datamodule=Data())
    assert trainer.global_step == 3
    assert "WARNING: one batch was not overfit" in caplog.text and "optim.lr" in caplog.text
    trainer = make_trainer(tmp_path, 5, callbacks=[resumed, Overfit(1e-9), Checkpointing(1)], **settings)
    trainer.fit(make_module(), datamodule=Data(), ckpt_path=folder / "last.ckpt", weights_only=True)
    assert not torch.equal(free.seen[0], free.seen[1])
    assert (len(first.seen), len(resumed.seen)) == (3, 2)
    assert all(torch.equal(batch, free.seen[0]) for batch in first.seen + resumed.seen)
    assert all(free.training) and not any(first.training + resumed.training)  # no dropout


@pytest.mark.parametrize("how", ["an exception", "an early end"])
def test_the_profiler_is_off_when_training_ends_in_between(tmp_path, caplog, how):
    """Left on, it ends Python with a segmentation fault instead of the exit status. AdamW's step is profiled twice, and
    not three times."""

    class End(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 3:
                assert torch.autograd._profiler_enabled()
                trainer.should_stop = True
                if how == "an exception":
                    raise RuntimeError("in between")

    caplog.set_level(logging.INFO)
    trainer = make_trainer(tmp_path, 9, callbacks=[Profile(1, 8, 1000), End()], limit_val_batches=0)
    with pytest.raises(RuntimeError) if how == "an exception" else contextlib.nullcontext():
        trainer.fit(make_module(), datamodule=Data())
    assert not torch.autograd._profiler_enabled()
    if how == "an early end":
        assert "2 steps:" in caplog.text and "aten::mm" in caplog.text
        events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
        assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2


KILLER = """
import os, pathlib, signal, lightning

class Kill(lightning.Callback):
    def kill(self, name):
        if not pathlib.Path(name).exists():
            pathlib.Path(name).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 7:
            self.kill("killed in step 7")

    def on_train_end(self, trainer, pl_module):
        self.kill("killed at the end")
"""
EARLY = [*TINY, "callbacks=[early_stopping,ema]", "callbacks.early_stopping.patience=2", "optim.lr=0.3",
         "trainer.max_steps=100", "trainer.checkpoint_every=3", "trainer.log_every=5", "model.dropout=0.2",
         "hydra.run.dir=run"]  # learns fast and then no more  # fmt: skip


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> Path:
    """An uninterrupted run, ended by early stopping, with averaged weights."""
    folder = tmp_path_factory.mktemp("early")
    done = subprocess.run([sys.executable, "-m", "gptlab.train", *EARLY], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"


def test_early_stopping_ends_after_the_validation_that_exhausts_the_patience(early):
    summary = summary_of(early)
    losses = {line["step"]: line["val/loss"] for line in metrics(early) if "val/loss" in line and line["step"]}
    best = min(losses, key=losses.get)
    assert summary["ended"] == "early_stopping" and 10 <= summary["steps"] < 100
    assert summary["steps"] == max(losses) == best + 4 == checkpoint(early)["global_step"]
    assert checkpoint(early, "best")["global_step"] == best == summary["best"]["step"]
    shown = (early.parent / "stdout").read_text()
    why = f"stopped at step {best + 4}: val/loss has not improved in the last 2 validations"
    assert shown.count("has not improved") == shown.count(why) == 1
    assert "gptlab.sample" in shown and "resume=" not in shown


@pytest.mark.slow
def test_a_run_killed_twice_stops_early_all_the_same(gptlab, tmp_path, early):
    """Killed in step 7 (resumed from 6), and between the end of training and the summary: patience, averaged and raw
    weights, metrics and the end are bitwise those of the uninterrupted run."""
    (tmp_path / "killer.py").write_text(KILLER)
    path, resume = {"PYTHONPATH": str(tmp_path)}, ["resume=run", "trust=true"]
    gptlab("train", *EARLY, "+callbacks.kill._target_=killer.Kill", status=-signal.SIGKILL, **path)
    gptlab("train", *resume, status=-signal.SIGKILL, **path)
    assert not (tmp_path / "run/summary.json").exists()
    gptlab("train", *resume, **path)
    assert "is finished: val/loss has not improved" in gptlab("train", *resume, "trainer.max_steps=200", **path).stdout
    assert_same_end(tmp_path / "run", early)
    ours, theirs = checkpoint(tmp_path / "run"), checkpoint(early)
    for key in ("current_model_state", "averaging_state"):
        torch.testing.assert_close(ours[key], theirs[key], atol=0, rtol=0)


@pytest.mark.slow
def test_a_run_that_is_out_of_time_only_pauses(gptlab, tmp_path):
    """Ended in the middle of an interval between logs: validated, saved and summed up; and once there is time again,
    it ends as the run that was never limited. The time counts on over resumes."""
    rest = [
        *TINY,
        "trainer.max_steps=100000",
        "trainer.val_every=100000",
        "trainer.log_every=7",
        "optim.decay_steps=9000",
    ]
    done = gptlab("train", *rest, "trainer.max_time=1s", "hydra.run.dir=run")
    run = tmp_path / "run"
    step = summary_of(run)["steps"]
    assert summary_of(run)["ended"] == "max_time" and f"stopped at step {step}: " in done.stdout and done.stderr == ""
    assert steps_of(run, "val/loss") == [0, step] and checkpoint(run)["global_step"] == step
    assert "resume=run trainer.max_time=null" in done.stdout

    before = (run / "summary.json").read_bytes()
    assert "reached trainer.max_time" in gptlab("train", "resume=run").stdout
    assert (run / "summary.json").read_bytes() == before

    gptlab("train", "resume=run", "trainer.max_time=1h", f"trainer.max_steps={step + 10}")
    assert checkpoint(run)["callbacks"]["Timer"]["time_elapsed"]["train"] > 1
    gptlab("train", *rest, f"trainer.max_steps={step + 10}", "hydra.run.dir=whole")
    ours, theirs = ([line for line in metrics(tmp_path / name) if "train/loss" in line] for name in ("run", "whole"))
    assert ours == theirs and same(weights(run), weights(tmp_path / "whole"))


class Recorder(L.Callback):
    """The raw weights after each step, the weights that are seen at the end of a validation, and what a checkpoint
    saved in the middle of one holds."""

    def __init__(self, folder: Path):
        self.folder, self.raw, self.validated, self.intervals = folder, [], {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.raw.append(flat(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        trainer.save_checkpoint(self.folder / "middle.ckpt")

    def on_validation_end(self, trainer, pl_module):
        self.validated[trainer.global_step] = flat(pl_module)
        self.intervals[trainer.global_step] = len(pl_module.recent)


def test_ema_is_what_is_validated_and_saved(tmp_path):
    """The average by hand; what the sampling callback sees; and what checkpoints hold, also one that is saved in the
    middle of a validation, while the two kinds of weights are exchanged."""
    recorder, module = Recorder(tmp_path), make_module(lr=0.1)
    module.log_every = 4
    trainer = make_trainer(tmp_path, 6, callbacks=[recorder, EMA(0.3), Checkpointing(every=2)], val_check_interval=2,
                           check_val_every_n_epoch=None, enable_checkpointing=True, plugins=[AtomicCheckpointIO()])  # fmt: skip
    trainer.fit(module, datamodule=Data())

    average = recorder.raw[0]
    for n, raw in enumerate(recorder.raw[1:], start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * raw
        if n + 1 in recorder.validated:
            torch.testing.assert_close(recorder.validated[n + 1], average)
            assert not torch.allclose(average, raw)
    assert len(recorder.validated) == 3

    last, middle = checkpoint(tmp_path), torch.load(tmp_path / "middle.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        torch.testing.assert_close(middle[key], last[key], atol=0, rtol=0)
    assert recorder.intervals[2] == 2  # two steps to be logged: not exchanged with the weights
    raw = torch.cat([last["current_model_state"][name].flatten() for name, _ in module.named_parameters()])
    assert torch.equal(raw, recorder.raw[-1])

    loaded = make_module()
    loaded.load_state_dict(checkpoint(tmp_path, "best")["state_dict"])
    make_trainer(tmp_path).validate(loaded, datamodule=Data(), verbose=False)
    assert loaded.validated["val/loss"] == module.best["val/loss"]
