"""Runs that are killed, stopped or moved, and resume as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DROPOUT, TINY, assert_same_end, metrics, same, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_callbacks import Data
from test_module import make_module, make_trainer

from gptlab import resume
from gptlab.callbacks import checkpointing
from gptlab.errors import UserError
from gptlab.run import Run

HERE = str(Path(__file__).parent)  # where disturb.py is
SMALL = [
    *DROPOUT,
    "trainer.checkpoint_every=3",
    "data.val_windows=20",
    "hydra.run.dir=run",
]  # several validation batches


def send(at: int, signum: int, when: str = "after", **settings) -> list[str]:
    given = {"_target_": "disturb.Send", "at": at, "signum": int(signum), "when": when, **settings}
    return [f"+callbacks.send.{key}={value}" for key, value in given.items()]


@pytest.fixture
def train(gptlab):
    """Train SMALL with one of disturb's callbacks (a name) and further arguments; returns the finished process."""

    def run(*arguments: str, disturb: str | None = None, status: int = 0, **environment: str):
        callback = [f"+callbacks.disturb._target_=disturb.{disturb}"] if disturb else []
        return gptlab("train", *SMALL, *callback, *arguments, status=status, PYTHONPATH=HERE, **environment)

    return run


@pytest.fixture
def continue_run(gptlab):
    return lambda *arguments, **rest: gptlab("train", "resume=run", "trust=true", *arguments, PYTHONPATH=HERE, **rest)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs to compare with, by number of processes."""
    runs = {}

    def run(devices: int = 1) -> Path:
        if devices not in runs:
            folder = tmp_path_factory.mktemp("whole")
            command = [sys.executable, "-m", "gptlab.train", *SMALL, f"trainer.devices={devices}"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
            runs[devices] = folder / "run"
        return runs[devices]

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of 4 steps, to copy, whose text has got another name."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "a.txt").write_text("To be, or not to be: that is the question.\n" * 100)
    command = [sys.executable, "-m", "gptlab.train", *TINY, "data=text", "data.path=a.txt", "hydra.run.dir=run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    (folder / "a.txt").rename(folder / "b, and better.txt")
    return folder


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(tag)]


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(2, [], marks=pytest.mark.slow),  # before its first checkpoint: starts again
        (5, []),  # resumes from 4: a validation, after which it was saved
        (8, ["data.workers=2"]),  # resumes from 6: a save between two logs and two validations; 8 was never validated
        pytest.param(11, [], marks=pytest.mark.slow),  # every step done, the last validation not
        pytest.param(7, ["trainer.devices=2"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_exactly(train, continue_run, tmp_path, whole, step, settings):
    """Dropout on, several micro-batches, killed without warning: weights, optimizer, metrics and best of the resumed run
    are bitwise those of the uninterrupted one. TensorBoard shows each point once, though the clock was set back."""
    train(*settings, *send(step, signal.SIGKILL), status=-signal.SIGKILL)
    run, uninterrupted = tmp_path / "run", whole(1 + ("trainer.devices=2" in settings))
    assert Run(run).read_summary() is None
    for events in run.glob("events.*"):
        parts = events.name.split(".")
        events.rename(events.with_name(".".join([*parts[:3], "9000000000", *parts[4:]])))
    continue_run()
    assert_same_end(run, uninterrupted)
    assert json.loads((run / "run.json").read_text())["resumed"][0]["step"] < step
    for tag in ("train/loss", "val/loss"):
        assert points(run, tag) == points(uninterrupted, tag)


@pytest.mark.parametrize(
    ("signum", "status", "step", "when"),
    [
        pytest.param(signal.SIGTERM, 143, 5, "in", marks=pytest.mark.slow),
        (signal.SIGTERM, 143, 8, "validation"),  # in the middle of it
        (signal.SIGINT, 130, 11, "in"),  # the last step: nothing but its validation is left
        # The terminal is closed; train.log has it all.
        pytest.param(signal.SIGHUP, 129, 5, "in", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, 8, "in", marks=pytest.mark.slow),  # before a validation
        pytest.param(signal.SIGTERM, 143, 11, "validation", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_saves_and_resumes(train, continue_run, tmp_path, whole, signum, status, step, when):
    """Saved at the very step, wherever the signal comes; what is left of a validation is done again."""
    train(*send(step, signum, when), status=status)
    said = (tmp_path / "run/train.log").read_text()
    assert f"at step {step}; the last checkpoint is of step {step}; to resume:" in said
    assert "python -m gptlab.train resume=run trust=true\n" in said
    assert Run(tmp_path / "run").read_summary() is None
    continue_run()
    assert json.loads((tmp_path / "run/run.json").read_text())["resumed"][0]["step"] == step
    assert_same_end(tmp_path / "run", whole())


@pytest.mark.parametrize(
    ("signum", "at", "when", "settings"),
    [
        (signal.SIGTERM, 0, "validation", ["data.val_windows=null"]),
        (signal.SIGINT, 2, "worker", ["data.workers=2"]),
        pytest.param(signal.SIGTERM, 2, "worker", ["data.workers=2"], marks=pytest.mark.slow),
    ],
)
def test_before_the_first_step_a_signal_ends_the_run_at_once(train, continue_run, tmp_path, signum, at, when, settings):
    """Even where a validation batch, or the start of a worker, takes a minute. No worker stays, and the run can start."""
    began = time.monotonic()
    done = train(*settings, *send(at, signum, when, then=60), status=128 + signum)
    assert time.monotonic() - began < 30, "the machine's time to start included"
    assert "nothing was saved yet; to start it again:" in done.stdout and done.stderr == ""
    if when == "worker":
        continue_run("trainer.max_steps=2", "trainer.log_every=1")
        assert [step for step, _ in points(tmp_path / "run", "train/loss")] == [1, 2]


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    """A long run, without validations, in a process that a test sends signals to."""
    command = [sys.executable, "-m", "gptlab.train", *SMALL[:-1], "trainer.max_steps=4000", "trainer.val_every=4000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen([*command, *arguments], cwd=folder, text=True, env=environment, **streams)


def test_ctrl_c_reaches_workers_and_a_pipe_too(tmp_path):
    """In a terminal, it would end the processes that prepare batches, and the run crash before it could save; and with
    `2>&1 | tee log`, it ends tee first."""
    pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    streams = {"stdout": pipe.stdin, "stderr": pipe.stdin}
    process = start(tmp_path, "hydra.run.dir=run", "data.workers=2", start_new_session=True, **streams)
    pipe.stdin.close()
    wait_for(lambda: (tmp_path / "run/checkpoints/last.ckpt").exists())
    pipe.kill()
    pipe.wait()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    step = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"the last checkpoint is of step {step}" in (tmp_path / "run/train.log").read_text()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """In the middle of a step that does not end."""
    process = start(tmp_path, "+callbacks.hang._target_=disturb.Hang", "hydra.run.dir=run")
    wait_for(lambda: (tmp_path / "hangs").exists())
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert "interrupted\nat step 5; the last checkpoint is of step 3" in said


@pytest.mark.parametrize(("step", "when"), [pytest.param(5, "in", marks=pytest.mark.slow), (8, "validation")])
def test_processes_that_are_apart_stop_together(train, continue_run, tmp_path, whole, step, when):
    """Only the second process gets the signal, and the first is two seconds late: both stop after the same step, and
    the checkpoint is good. (Lightning's own handler deadlocks here.)"""
    train("trainer.devices=2", *send(step, signal.SIGTERM, when, rank=1, late=2.0), status=143)
    assert {(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)} == {f"{step} SIGTERM"}
    continue_run()
    assert_same_end(tmp_path / "run", whole(2))


@pytest.mark.slow
def test_another_number_of_processes_sees_the_same_batches(train, continue_run, tmp_path):
    """Without dropout, whose numbers are the process's own: from two processes to one, the losses continue."""
    calm = ["model.dropout=0", "data.batch_size=7", "data.micro_batch_size=2", "data.val_windows=11"]
    train(*calm, "hydra.run.dir=whole")
    train(*calm, "trainer.devices=2", *send(7, signal.SIGKILL), status=-signal.SIGKILL)
    continue_run("trainer.devices=1", "data.micro_batch_size=7")
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert len(one) == len(two) > 5
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a == {name: pytest.approx(value, rel=1e-4) for name, value in b.items()}


def test_slurms_signal_saves_and_requeues(train, tmp_path):
    """A stand-in for scontrol notes how it is called; the job's name in the queue is the array's."""
    fake = tmp_path / "bin/scontrol"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > scontrol-was-called\n')
    fake.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_ARRAY_JOB_ID": "47",
             "SLURM_ARRAY_TASK_ID": "3", "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    said = train(*send(5, signal.SIGUSR1, "in"), status=143, **slurm).stdout
    assert (tmp_path / "scontrol-was-called").read_text() == "requeue 47_3\n"
    assert "the last checkpoint is of step 5" in said and "requeued SLURM job 47_3" in said


def test_a_crash_leaves_the_last_checkpoint_and_says_how_to_resume(train, continue_run, tmp_path, whole):
    said = train(disturb="Fail", status=1).stdout
    for text in ("a fault in a callback", "at step 7; the last checkpoint is of step 6", "gptlab.train resume=run"):
        assert text in said and text in (tmp_path / "run/train.log").read_text()
    continue_run()
    assert_same_end(tmp_path / "run", whole())


@pytest.mark.slow
def test_a_validation_that_is_done_again_is_logged_once(train, continue_run, tmp_path):
    """Stopped in the middle of the validation of step 9; the resumed run logs it, and is killed before it can save
    anything; and once more. Neither metrics.jsonl nor TensorBoard has it twice, and both have what training logged."""
    train("trainer.val_every=9", *send(9, signal.SIGTERM, "validation"), disturb="KillUnsaved", status=143)
    continue_run(status=-signal.SIGKILL)
    continue_run(status=-signal.SIGKILL)
    continue_run()
    for tag, steps in (("val/loss", [0, 9, 11]), ("train/loss", [3, 6, 9, 11])):
        assert [line["step"] for line in metrics(tmp_path / "run") if tag in line] == steps
        assert [step for step, _ in points(tmp_path / "run", tag)] == steps


@pytest.mark.slow
def test_the_last_validation_of_a_run_that_a_callback_ended(train, continue_run, tmp_path):
    train(*send(6, signal.SIGTERM, "validation"), disturb="End", status=143)
    continue_run()
    summary = Run(tmp_path / "run").read_summary()
    assert (summary["steps"], summary["ended"], summary["last"]["step"]) == (6, "callback", 6)


def test_names_of_checkpoints_and_a_kill_before_they_are_given(tmp_path, monkeypatch):
    """best and the milestones are second names for what was saved. Killed before the checkpoint got them, a resume adds
    them; milestones are never removed."""
    losses = {2: 3.0, 4: 2.0, 6: 1.0, 8: 2.5}

    def fit(steps: int, ckpt: Path | None = None) -> dict[str, int]:
        module = make_module()
        module.val_metrics.compute = lambda: {"loss": losses.get(module.trainer.global_step, 9.0)}
        trainer = make_trainer(
            tmp_path, steps, callbacks=[checkpointing.Checkpointing(every=2, keep_every=3)], val_check_interval=2,
            check_val_every_n_epoch=None, enable_checkpointing=True, plugins=[checkpointing.AtomicCheckpointIO()],
        )  # fmt: skip
        trainer.fit(module, datamodule=Data(), ckpt_path=ckpt)
        files = (tmp_path / "checkpoints").iterdir()
        return {file.stem: torch.load(file, weights_only=True)["global_step"] for file in files}

    milestones = {"step_00000003": 3, "step_00000006": 6}
    assert fit(8) == {"best": 6, "last": 8, "previous": 6, **milestones}
    shutil.rmtree(tmp_path / "checkpoints")
    link = checkpointing._link
    monkeypatch.setattr(checkpointing, "_link", lambda *names: names[1].stem == "previous" and link(*names))
    assert fit(6) == {"last": 6, "previous": 4}
    monkeypatch.undo()
    assert fit(8, tmp_path / "checkpoints/last.ckpt") == {"best": 6, "last": 8, "previous": 6, "step_00000006": 6}


def test_a_finished_run_says_so_and_can_be_extended(gptlab, tmp_path):
    """The schedule stays as it was saved, unless another is asked for; how often to save and log may change."""
    rest = [argument for argument in DROPOUT if not argument.startswith("optim.decay_steps")]
    gptlab("train", *rest, "hydra.run.dir=run")
    run, before = tmp_path / "run", weights(tmp_path / "run")
    said = gptlab("train", "resume=run").stdout
    assert "all 11 steps are done" in said and "resume=run trainer.max_steps=22" in said
    assert same(before, weights(run))
    gptlab("train", "resume=run", "trainer.max_steps=14", "trainer.checkpoint_every=13", "trainer.log_every=2")
    assert Run(run).read_summary()["steps"] == 14 and Run(run).read_config()["optim"]["decay_steps"] == 11
    assert torch.load(run / "checkpoints/previous.ckpt", weights_only=True)["global_step"] == 13
    for tag, steps in (("val/loss", [0, 4, 8, 11, 12, 14]), ("train/loss", [3, 6, 9, 11, 12, 14])):
        assert [line["step"] for line in metrics(run) if tag in line] == steps
    gptlab("train", "resume=run", "trainer.max_steps=15", "optim.decay_steps=40")
    assert Run(run).read_config()["optim"]["decay_steps"] == 40


def test_a_resume_keeps_its_config():
    resume.check_changes(resume.RESUME_MAY_CHANGE)
    resume.check_changes(["trainer.linear"])
    for key in ("optim.lr", "model", "trainer.val_every", "seed", "trainer.precision", "x", "hydra.run.dir", "~logger"):
        with pytest.raises(UserError, match=rf"cannot change {key}.*can change trainer\.max_steps,"):
            resume.check_changes([key, "trainer.max_steps"])
    with pytest.raises(UserError, match=r"requires trainer\.max_steps"):
        resume.check_changes(["optim.decay_steps"])


@pytest.mark.parametrize(
    ("summary", "limits", "finished"),
    [
        ({"ended": "max_steps"}, {}, True),
        ({"ended": "max_steps"}, {"max_steps": 20}, False),
        ({"ended": "max_steps"}, {"max_time": "00:01:00:00"}, True),
        ({"ended": "max_time"}, {"max_steps": 20}, True),
        ({"ended": "max_time"}, {"max_time": None}, False),
        ({"ended": "early_stopping"}, {"max_steps": 20}, True),
        ({"ended": "max_steps", "steps": 11}, {}, False),  # its last checkpoint was lost since
        (None, {}, False),
    ],
)
def test_what_is_finished(tmp_path, summary, limits, finished):
    """It is the limit which ended a run that must be lifted."""
    before = {"max_steps": 10, "max_time": "00:00:10:00"}
    state = {"global_step": 10, "config": {"trainer": before}}
    if summary:
        Run(tmp_path).write_summary({"steps": 10, "why": None, "best": {}, **summary})
    assert (resume.finished_summary(Run(tmp_path), state, **before | limits) is not None) == finished
    with pytest.raises(UserError, match="already reached step 10"):
        resume.finished_summary(Run(tmp_path), state, 9, None)


def test_a_project_that_was_moved_resumes_where_it_lies(gptlab, tmp_path, finished):
    """The text by its new name: that it is the same, its checksum says. With another one, a resume is refused before the
    run folder is touched, as is a value that is out of range."""
    shutil.copytree(finished, tmp_path / "my outputs")
    run, text = Run(tmp_path / "my outputs/run"), tmp_path / "my outputs/b, and better.txt"
    longer = ("resume=my outputs/run", "trainer.max_steps=6")
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.suffix in (".json", ".jsonl", ".yaml")}
    assert "a.txt: No such file" in gptlab("train", *longer, status=2).stderr
    for value in ("trainer.max_steps=abc", "trainer.max_steps=3", "trainer.max_time=90"):
        stderr = gptlab("train", longer[0], f"data.path={text}", value, status=2).stderr
        assert value.partition("=")[0] in stderr and "Traceback" not in stderr
    content = text.read_text()
    text.write_text(content + "?")
    assert "restore it, or start a new run" in gptlab("train", *longer, f"data.path={text}", status=2).stderr
    assert len(before) == 4 and before == {path: path.read_bytes() for path in before}
    text.write_text(content)
    said = gptlab("train", *longer, "data.path=my outputs/b, and better.txt").stdout
    assert "gptlab.sample ckpt='my outputs/run'\n" in said and "resume='my outputs/run' trainer" in said
    (tmp_path / "my outputs").rename(tmp_path / "outputs")
    gptlab("train", "resume=latest", "trainer.max_steps=8", "data.path=outputs/b, and better.txt")
    assert Run(tmp_path / "outputs/run").read_summary()["steps"] == 8 and not (tmp_path / "run").exists()


def test_a_resume_never_falls_back_to_another_text(gptlab, tmp_path, shakespeare):
    (tmp_path / "data").mkdir()
    shutil.copy(shakespeare, tmp_path / "data/shakespeare_char.txt")
    gptlab("train", "experiment=shakespeare_char", *TINY, "data.url=http://127.0.0.1:9/", "hydra.run.dir=run")
    (tmp_path / "data").rename(tmp_path / "away")
    assert "cannot be downloaded" in gptlab("train", "resume=run", "trust=true", "trainer.max_steps=6", status=2).stderr
    (tmp_path / "away").rename(tmp_path / "data")
    assert (
        "trust=true" in gptlab("train", "resume=run", "trainer.max_steps=6", status=2).stderr
    )  # conf/ has no such url
    gptlab("train", "resume=run", "trust=true", "trainer.max_steps=6", GPTLAB_DATA="elsewhere")  # the folder was saved
    assert Run(tmp_path / "run").read_summary()["data"]["name"] == "shakespeare_char"


def test_a_resume_does_not_ask_conf(gptlab, tmp_path):
    """Whether its files have changed or are gone: config.yaml in the run folder is what counts."""
    mine = tmp_path / "conf/optim/mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("defaults: [adamw, _self_]\nlr: 0.002\n")
    gptlab("train", "--config-dir", "conf", "optim=mine", *TINY, "hydra.run.dir=run")
    mine.write_text("lr: 7\n")
    shutil.rmtree(tmp_path / "conf/optim")
    gptlab("train", "resume=run", "trainer.max_steps=6")
    assert Run(tmp_path / "run").read_config()["optim"]["lr"] == 0.002


@pytest.mark.parametrize(
    "evil",
    [
        {"hydra": {"callbacks": {"evil": {"_target_": "os.system", "command": "touch executed"}}}},
        {"callbacks": {"evil": {"_target_": "evil.Callback"}}},
        {"callbacks": {"progress": {"_target_": "gptlab.callbacks.progress.Progress", "x": [{"_target_": "evil.Callback"}]}}},
        {"logger": {"_target_": "evil.Callback"}},
        {"model": {"_target_": "gptlab.cli.os.system", "command": "touch executed"}},
        {"data": {"url": "http://127.0.0.1:9/", "sha256": "0" * 64, "file": "a.txt", "folder": "."}},
        {"data": {"url": "http://127.0.0.1:9/", "sha256": "0" * 64, "file": "../a.txt", "folder": "."}},
    ],
)  # fmt: skip
def test_a_run_folder_from_elsewhere_runs_no_code(gptlab, tmp_path, finished, evil):
    """Neither what Hydra would build while composing nor what the run would, however deeply it is nested."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text("open('executed', 'w')")
    saved = Run(tmp_path / "run").read_config()
    if "data" in evil:  # a download, which would write where the folder says
        evil = {"data": {**saved["data"], "name": "a", **evil["data"]}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**saved, "trust": True, **evil}))
    done = gptlab("train", "resume=run", "trainer.max_steps=6", status=2)
    assert not (tmp_path / "executed").exists() and "Traceback" not in done.stderr
    if "hydra" not in evil:
        assert "trust=true" in done.stderr
