"""debug=fast, overfit and profile; runs that end early; averaged weights."""

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
from conftest import TINY
from test_callbacks import Data
from test_module import make_module, make_trainer

from gptlab.callbacks.checkpointing import AtomicCheckpointIO, Checkpointing
from gptlab.callbacks.debug import Overfit, Profile
from gptlab.callbacks.ema import EMA


def read(run: Path) -> tuple[dict, list[dict]]:
    """The summary without what measures the machine, and the lines of metrics.jsonl without speeds."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: value for key, value in summary.items() if key not in ("seconds", "tokens_per_s")}, [
        line for line in lines if "train/tokens_per_s" not in line
    ]


def steps_of(lines: list[dict], name: str) -> list[int]:
    return [line["step"] for line in lines if name in line]


def checkpoint(run: Path, name: str = "last") -> dict:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert read(ours) == read(theirs)
    for name in ("last", "best"):
        a, b = checkpoint(ours, name), checkpoint(theirs, name)
        for key in ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states"):
            torch.testing.assert_close(a.get(key), b.get(key), atol=0, rtol=0)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_fast_is_two_steps_of_any_experiment(gptlab, tmp_path):
    """It must win over the experiment's own numbers, and leave its model alone."""
    done = gptlab("train", "experiment=shakespeare_char", "debug=fast", "hardware=cpu", "data.url=http://127.0.0.1:9/")
    assert done.stderr == ""
    (run,) = (tmp_path / "outputs/debug").iterdir()
    summary, lines = read(run)
    assert (summary["steps"], summary["ended"]) == (2, "max_steps")
    assert steps_of(lines, "train/loss") == [1, 2] and steps_of(lines, "val/loss") == [0, 1, 2]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["n_layer"] == 4 and config["data"]["block_size"] == 64


def test_overfit_learns_one_batch_and_ends(gptlab, tmp_path):
    done = gptlab("train", "debug=overfit", "hardware=cpu", "hydra.run.dir=run")
    assert done.stderr == "" and done.stdout.count("one batch overfit: loss 0.0") == 1
    assert "trainer.max_steps=" not in done.stdout  # nothing to go on with
    summary, lines = read(tmp_path / "run")
    end = summary["steps"]
    assert end < 300 and end % 10 == 0 and checkpoint(tmp_path / "run")["global_step"] == end
    assert steps_of(lines, "train/loss") == list(range(10, end + 1, 10)) and steps_of(lines, "val/loss") == [0, end]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
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


def test_profile_covers_the_steps_it_was_asked_for(gptlab, tmp_path):
    """Two of four steps are profiled: AdamW's step is there twice, not at all or four times would be wrong."""
    profile = ["callbacks.profile.skip_steps=1", "callbacks.profile.steps=2", "callbacks.profile.rows=1000"]
    small = ["model=gpt-nano", "hardware=cpu", "trainer.max_steps=4", "callbacks.sample_text.max_new_tokens=5"]
    done = gptlab("train", "debug=profile", *small, *profile, "hydra.run.dir=run")
    assert done.stderr == "" and read(tmp_path / "run")[0]["steps"] == 4
    events = json.loads((tmp_path / "run/profile/trace.json").read_text())["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#AdamW.step" for event in events) == 2
    (row,) = (line for line in done.stdout.splitlines() if "Optimizer.step#AdamW.step" in line)
    assert row.split()[-1] == "2" and "aten::mm" in done.stdout and "profile/trace.json" in done.stdout


def test_an_exception_switches_the_profiler_off(tmp_path):
    """Left on, it ends Python with a segmentation fault instead of the exit status."""

    class Fails(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.autograd._profiler_enabled()
            raise RuntimeError("in between")

    callbacks = [Profile(skip_steps=0, steps=2, rows=1), Fails()]
    with pytest.raises(RuntimeError, match="in between"):
        make_trainer(tmp_path, 4, callbacks=callbacks, limit_val_batches=0).fit(make_module(), datamodule=Data())
    assert not torch.autograd._profiler_enabled()


KILLER = """
import os, pathlib, signal, lightning

class Kill(lightning.Callback):
    def __init__(self, at):
        self.at, self.done = at, pathlib.Path("killed-once")

    def kill(self):
        if not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            self.kill()

    def on_train_end(self, trainer, pl_module):
        if self.at == 0:
            self.kill()
"""
# Learns fast and then no more; with what early stopping needs, kept apart from what test_train.py covers
EARLY = [
    *TINY,
    "callbacks=[early_stopping,ema]",
    "callbacks.early_stopping.patience=2",
    "optim.lr=0.3",
    "trainer.max_steps=100",
    "trainer.checkpoint_every=3",
    "trainer.log_every=5",
    "model.dropout=0.2",
    "hydra.run.dir=run",
]


@pytest.fixture(scope="module")
def early(tmp_path_factory) -> Path:
    """An uninterrupted run, ended by early stopping, with averaged weights."""
    folder = tmp_path_factory.mktemp("early")
    done = subprocess.run([sys.executable, "-m", "gptlab.train", *EARLY], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"


def test_early_stopping_ends_after_the_validation_that_exhausts_the_patience(early):
    summary, lines = read(early)
    losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line and line["step"]}
    best = min(losses, key=losses.get)
    assert summary["ended"] == "early_stopping" and 10 <= summary["steps"] < 100
    assert summary["steps"] == max(losses) == best + 4 == checkpoint(early)["global_step"]
    assert checkpoint(early, "best")["global_step"] == best == summary["best"]["step"]
    shown = (early.parent / "stdout").read_text()
    why = f"stopped at step {best + 4}: val/loss has not improved in the last 2 validations"
    assert shown.count("has not improved") == shown.count(why) == 1
    assert "gptlab.sample" in shown and "resume=" not in shown


@pytest.mark.parametrize("at", [7, 0])
def test_a_killed_run_stops_early_all_the_same(gptlab, tmp_path, early, at):
    """Killed in step 7 (goes on from 6), and between the end of training and the summary: patience, averaged and raw
    weights, metrics and the end are bitwise those of the untouched run."""
    (tmp_path / "killer.py").write_text(KILLER)
    kill = ["+callbacks.kill._target_=killer.Kill", f"+callbacks.kill.at={at}"]
    gptlab("train", *EARLY, *kill, status=-signal.SIGKILL, PYTHONPATH=str(tmp_path))
    assert not (tmp_path / "run/summary.json").exists()
    done = gptlab("train", "resume=run", PYTHONPATH=str(tmp_path))
    assert done.stderr == ""
    assert_same_run(tmp_path / "run", early)
    if at == 0:
        said = gptlab("train", "resume=run", "trainer.max_steps=200", PYTHONPATH=str(tmp_path)).stdout
        assert "is finished: val/loss has not improved" in said
        assert_same_run(tmp_path / "run", early)


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
    done = gptlab("train", *rest, "trainer.max_time=00:00:00:01", "hydra.run.dir=run")
    run = tmp_path / "run"
    summary, lines = read(run)
    step = summary["steps"]
    assert summary["ended"] == "max_time" and f"stopped at step {step}: " in done.stdout and done.stderr == ""
    assert steps_of(lines, "val/loss") == [0, step] and checkpoint(run)["global_step"] == step
    assert "resume=run trainer.max_time=null" in done.stdout

    before = (run / "summary.json").read_bytes()
    assert "time that trainer.max_time allows is over" in gptlab("train", "resume=run").stdout
    assert (run / "summary.json").read_bytes() == before

    more = ["trainer.max_time=00:01:00:00", f"trainer.max_steps={step + 10}"]
    gptlab("train", "resume=run", *more)
    elapsed = checkpoint(run)["callbacks"]["Timer"]["time_elapsed"]["train"]
    assert read(run)[0]["ended"] == "max_steps" and elapsed > 1

    gptlab("train", *rest, f"trainer.max_steps={step + 10}", "hydra.run.dir=whole")
    lines, whole = read(run)[1], read(tmp_path / "whole")[1]
    assert [line for line in lines if "train/loss" in line] == [line for line in whole if "train/loss" in line]
    ours, theirs = (checkpoint(tmp_path / name)["state_dict"] for name in ("run", "whole"))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


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


def test_a_profile_that_is_cut_short_shows_what_there_is(tmp_path, caplog):
    """Left running, the profiler crashes the interpreter on its way out."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or trainer.global_step == 3

    with caplog.at_level(logging.INFO):
        trainer = make_trainer(tmp_path, 9, callbacks=[Stop(), Profile(1, 8, 3)], limit_val_batches=0)
        trainer.fit(make_module(), datamodule=Data())
    assert "2 steps:" in caplog.text and (tmp_path / "profile/trace.json").exists()
