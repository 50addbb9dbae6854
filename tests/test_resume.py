"""Runs that are killed, stopped or moved, and go on as if nothing had happened."""

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

# A callback that sends its own process a signal, once, at a moment of its config: in a step, after it, or in the middle
# of a validation; in the process of one rank, while the others are late for their step.
SENDER = """
import os, pathlib, time, lightning

class Send(lightning.Callback):
    def __init__(self, at, signum, when="after", rank=0, late=0.0):
        self.moment, self.signum, self.rank, self.late = (when, at), signum, rank, late

    def send(self, trainer, when, step):
        done = pathlib.Path("signal-was-sent")
        if (when, step) != self.moment or done.exists():
            return
        if trainer.global_rank == self.rank:
            done.touch()
            os.kill(os.getpid(), self.signum)
        else:
            time.sleep(self.late)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.send(trainer, "in", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.send(trainer, "after", trainer.global_step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            self.send(trainer, "validation", trainer.global_step)

    def on_exception(self, trainer, pl_module, exception):
        pathlib.Path(f"ended-{trainer.global_rank}").write_text(f"{trainer.global_step} {exception}")
"""
# Validations of several batches.
SMALL = [*DROPOUT, "trainer.checkpoint_every=3", "data.val_windows=20", "hydra.run.dir=run"]


def send(at: int, signum: int, when: str = "after", **settings) -> list[str]:
    given = {"_target_": "sender.Send", "at": at, "signum": int(signum), "when": when, **settings}
    return [f"+callbacks.send.{key}={value}" for key, value in given.items()]


@pytest.fixture
def stopped(gptlab, tmp_path):
    """A run that gets a signal; returns the finished process, which ended with the status given."""
    (tmp_path / "sender.py").write_text(SENDER)

    def run(*arguments: str, status: int, **environment: str):
        return gptlab("train", *SMALL, *arguments, status=status, PYTHONPATH=str(tmp_path), **environment)

    return run


def resume(gptlab, tmp_path, *arguments: str, **settings):
    return gptlab("train", "resume=run", *arguments, PYTHONPATH=str(tmp_path), **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody touched, to compare with, by number of processes."""
    runs = {}

    def run(devices: int = 1) -> Path:
        if devices not in runs:
            folder = tmp_path_factory.mktemp("whole")
            command = [sys.executable, "-m", "gptlab.train", *SMALL, f"trainer.devices={devices}"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
            runs[devices] = folder / "run"
        return runs[devices]

    return run


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (5, []),  # goes on from 4: a validation, after which it was saved
        (8, ["data.workers=2"]),  # goes on from 6: a save between two logs and two validations; 8 was never validated
        pytest.param(11, [], marks=pytest.mark.slow),  # every step done, the last validation not
        (7, ["trainer.devices=2"]),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(gptlab, tmp_path, whole, stopped, step, settings):
    """Dropout on, several micro-batches, killed without warning: the weights, optimizer, metrics and best of the
    resumed run are bitwise those of the untouched one, and TensorBoard shows each point once."""
    stopped(*settings, *send(step, signal.SIGKILL), status=-signal.SIGKILL)
    run, untouched = tmp_path / "run", whole(1 + ("trainer.devices=2" in settings))
    assert not (run / "summary.json").exists()
    resume(gptlab, tmp_path)
    assert_same_end(run, untouched)
    assert json.loads((run / "run.json").read_text())["resumed"][0]["step"] < step
    events, expected = (EventAccumulator(str(folder / "tensorboard")).Reload() for folder in (run, untouched))
    for tag in ("train/loss", "val/loss"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(e.step, e.value) for e in expected.Scalars(tag)]


@pytest.mark.parametrize(
    ("signum", "status", "step", "when"),
    [
        (signal.SIGTERM, 143, 5, "in"),
        (signal.SIGINT, 130, 5, "in"),
        pytest.param(signal.SIGTERM, 143, 8, "in", marks=pytest.mark.slow),  # before a validation
        (signal.SIGTERM, 143, 8, "validation"),  # in the middle of one
        (signal.SIGINT, 130, 11, "in"),  # the last step: nothing but its validation is left
        pytest.param(signal.SIGTERM, 143, 11, "validation", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_saves_and_goes_on(gptlab, tmp_path, whole, stopped, signum, status, step, when):
    """Saved at the very step, wherever the signal comes; what is left of a validation is done again."""
    said = stopped(*send(step, signum, when), status=status).stdout
    assert f"at step {step}; the last checkpoint is of step {step}; to go on from there:" in said
    assert "python -m gptlab.train resume=run" in said
    assert not (tmp_path / "run/summary.json").exists()
    resume(gptlab, tmp_path)
    assert json.loads((tmp_path / "run/run.json").read_text())["resumed"][0]["step"] == step
    assert_same_end(tmp_path / "run", whole())


def test_workers_leave_signals_to_the_run(gptlab, tmp_path, whole, stopped):
    """Ctrl-C in a terminal reaches the processes that prepare batches too: were they to end of it, the run would crash
    before it could save."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptlab.train", *SMALL, "data.workers=2", "trainer.max_steps=4000", "trainer.val_every=4000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "run/checkpoints/last.ckpt").exists())
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "" and "the last checkpoint is of step" in said


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def test_a_signal_before_the_first_step_ends_the_run_too(gptlab, tmp_path, whole, stopped):
    said = stopped(*send(0, signal.SIGTERM, "validation"), status=143).stdout
    assert "nothing was saved yet; to start it again:" in said
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole())


@pytest.mark.parametrize(("step", "when"), [pytest.param(5, "in", marks=pytest.mark.slow), (8, "validation")])
def test_processes_that_are_apart_stop_together(gptlab, tmp_path, whole, stopped, step, when):
    """Only the second process gets the signal, and the first is two seconds late: both stop after the same step, and
    the checkpoint is good. (Lightning's own handler deadlocks here.)"""
    began = time.monotonic()
    stopped("trainer.devices=2", *send(step, signal.SIGTERM, when, rank=1, late=2.0), status=143)
    assert time.monotonic() - began < 60
    assert {(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)} == {f"{step} SIGTERM"}
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole(2))


def test_slurms_signal_saves_and_requeues(gptlab, tmp_path, whole, stopped):
    """A stand-in for scontrol notes how it is called; the job's name in the queue is the array's."""
    fake = tmp_path / "bin/scontrol"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > scontrol-was-called\n')
    fake.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train",
             "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_ARRAY_JOB_ID": "47",
             "SLURM_ARRAY_TASK_ID": "3", "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    said = stopped(*send(5, signal.SIGUSR1, "in"), status=143, **slurm).stdout
    assert (tmp_path / "scontrol-was-called").read_text() == "requeue 47_3\n"
    assert "the last checkpoint is of step 5" in said and "requeued SLURM job 47_3" in said
    resume(gptlab, tmp_path, **slurm)
    assert_same_end(tmp_path / "run", whole())


def test_a_crash_leaves_the_last_checkpoint_and_says_how_to_go_on(gptlab, tmp_path, whole):
    (tmp_path / "broken.py").write_text(
        "import lightning, pathlib\n"
        "class Broken(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_step == 7 and not pathlib.Path('mended').exists():\n"
        "            raise KeyError('a fault in a callback')\n"
    )
    broken = [*SMALL, "+callbacks.broken._target_=broken.Broken"]
    said = gptlab("train", *broken, status=1, PYTHONPATH=str(tmp_path)).stdout
    for text in ("a fault in a callback", "at step 7; the last checkpoint is of step 6", "gptlab.train resume=run"):
        assert text in said and text in (tmp_path / "run/train.log").read_text()
    (tmp_path / "mended").touch()
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole())


def test_another_number_of_processes_sees_the_same_batches(gptlab, tmp_path, stopped):
    """Without dropout, whose numbers are the process's own: from two processes to one, the losses go on."""
    calm = ["model.dropout=0", "data.batch_size=7", "data.micro_batch_size=2", "data.val_windows=11"]
    gptlab("train", *SMALL, *calm, "hydra.run.dir=whole")
    stopped(*calm, "trainer.devices=2", *send(7, signal.SIGKILL), status=-signal.SIGKILL)
    resume(gptlab, tmp_path, "trainer.devices=1", "data.micro_batch_size=7")
    one, two = metrics(tmp_path / "whole"), metrics(tmp_path / "run")
    assert len(one) == len(two) > 5
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a == {name: pytest.approx(value, rel=1e-4) for name, value in b.items()}


def test_a_run_killed_before_its_first_checkpoint_starts_again(gptlab, tmp_path, whole, stopped):
    """And neither metrics.jsonl nor TensorBoard show a step twice."""
    stopped(*send(2, signal.SIGKILL), status=-signal.SIGKILL)
    assert not (tmp_path / "run/checkpoints").exists()
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole())
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 11]


def test_killed_between_saving_and_marking_the_best(gptlab, tmp_path, whole, stopped):
    """best.ckpt is a second name for what was saved. Killed before the last and best checkpoint got it, the run would
    end with the name at an older one."""
    (tmp_path / "unmarked.py").write_text(
        "import os, pathlib, signal\n"
        "from gptlab.callbacks.checkpointing import Checkpointing\n"
        "class Unmarked(Checkpointing):\n"
        "    marked = 0\n"
        "    @classmethod\n"
        "    def _link(cls, source, target):\n"
        "        cls.marked += target.name == 'best.ckpt'\n"
        "        if cls.marked == 3 and not pathlib.Path('killed').exists():\n"
        "            pathlib.Path('killed').touch()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        Checkpointing._link(source, target)\n"
    )
    stopped("callbacks.checkpointing._target_=unmarked.Unmarked", status=-signal.SIGKILL)
    saved = tmp_path / "run/checkpoints"
    steps = [torch.load(saved / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("last", "best")]
    assert steps == [11, 8]
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole())


def test_how_often_it_is_saved_may_change(gptlab, tmp_path):
    """trainer.checkpoint_every, and not a number of its own that the callback got when the run began."""
    gptlab("train", *TINY, "hydra.run.dir=run")
    gptlab("train", "resume=run", "trainer.max_steps=6", "trainer.checkpoint_every=5", "trainer.log_every=2")
    previous = torch.load(tmp_path / "run/checkpoints/previous.ckpt", weights_only=True)
    assert previous["global_step"] == 5
    assert [line["step"] for line in metrics(tmp_path / "run") if "train/loss" in line] == [1, 2, 3, 4, 6]


def test_how_often_without_checkpoints_means_nothing(gptlab, tmp_path):
    """There is no such callback, and there must not be half of one."""
    gptlab("train", *TINY[:-1], "~callbacks", "hydra.run.dir=run")
    gptlab("train", "resume=run", "trainer.checkpoint_every=5")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["callbacks"] is None
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_longer_schedule_only_if_asked(gptlab, tmp_path):
    gptlab("train", *TINY, "hydra.run.dir=run")
    refused = gptlab("train", "resume=run", "optim.decay_steps=40", status=2).stderr
    assert "goes with trainer.max_steps" in refused
    gptlab("train", "resume=run", "trainer.max_steps=6", "optim.decay_steps=40")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["decay_steps"] == 40


@pytest.mark.parametrize(
    "overrides",
    [["optim.lr=1", "model=gpt2"], ["trainer.val_every=3"], ["seed=1"], ["trainer.precision=bf16"], ["+x=1"],
     ["trainer.extra.benchmark=true"], ["hydra.run.dir=elsewhere"], ["~logger"], ["callbacks=ema"]],
)  # fmt: skip
def test_a_resume_keeps_its_config(gptlab, tmp_path, overrides):
    """Anything else that is given is refused by its name, before the folder is even looked at."""
    stderr = gptlab("train", "resume=run", *overrides, "trainer.max_steps=6", status=2).stderr
    assert (
        all(override.partition("=")[0].lstrip("+") in stderr for override in overrides)
        and "trainer.max_steps," in stderr
    )
    assert "Traceback" not in stderr


def test_a_finished_run_says_so_and_can_be_extended(gptlab, tmp_path):
    """The schedule stays as it was saved: decay_steps is a number there, not a reference to max_steps."""
    rest = [argument for argument in DROPOUT if not argument.startswith("optim.decay_steps")]
    gptlab("train", *rest, "hydra.run.dir=run")
    before = weights(tmp_path / "run")
    for way in ("resume=run", "+resume=run", "++resume=run"):  # as keys of Lightning's are given
        assert "has finished its 11 steps" in gptlab("train", way).stdout
    assert same(before, weights(tmp_path / "run"))
    gptlab("train", "resume=run", "trainer.max_steps=14")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 14
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["decay_steps"] == 11
    assert [line["step"] for line in metrics(tmp_path / "run") if "val/loss" in line] == [0, 4, 8, 11, 12, 14]


def test_a_moved_run_resumes_where_it_lies(gptlab, tmp_path):
    gptlab("train", *TINY, "hydra.run.dir=run")
    (tmp_path / "new place").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "new place/run, moved")
    gptlab("train", "resume=new place/run, moved", "trainer.max_steps=6")
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "new place/run, moved/summary.json").read_text())["steps"] == 6


def test_a_moved_text_is_named_by_its_new_place(gptlab, tmp_path):
    """Or a project folder that was moved whole could never go on. That it is the same text, its checksum says."""
    (tmp_path / "old.txt").write_text("To be, or not to be: that is the question.\n" * 100)
    gptlab("train", *TINY, "data=text", "data.path=old.txt", "hydra.run.dir=run")
    (tmp_path / "old.txt").rename(tmp_path / "new, and better.txt")
    assert "old.txt: No such file" in gptlab("train", "resume=run", "trainer.max_steps=6", status=2).stderr
    gptlab("train", "resume=run", "trainer.max_steps=6", "data.path=new, and better.txt")
    gptlab("train", "resume=run", "trainer.max_steps=8")
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 8


def test_a_resume_with_another_text_changes_nothing(gptlab, tmp_path):
    """Refused before the run folder is touched: with the old text back, the run goes on."""
    text = "To be, or not to be: that is the question.\n" * 100
    (tmp_path / "my text.txt").write_text(text)
    gptlab("train", *TINY, "data=text", "data.path=my text.txt", "hydra.run.dir=run")
    before = {
        name: (tmp_path / "run" / name).read_bytes()
        for name in ("summary.json", "config.yaml", "run.json", "metrics.jsonl")
    }
    (tmp_path / "my text.txt").write_text(text + "?")
    assert "put the old text back" in gptlab("train", "resume=run", "trainer.max_steps=6", status=2).stderr
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    (tmp_path / "my text.txt").write_text(text)
    gptlab("train", "resume=run", "trainer.max_steps=6")


def test_a_resume_never_falls_back_to_another_text(gptlab, tmp_path, shakespeare):
    (tmp_path / "data").mkdir()
    shutil.copy(shakespeare, tmp_path / "data/shakespeare_char.txt")
    gptlab("train", "experiment=shakespeare_char", *TINY, "data.url=http://127.0.0.1:9/", "hydra.run.dir=run")
    (tmp_path / "data").rename(tmp_path / "away")
    assert "cannot be downloaded" in gptlab("train", "resume=run", "trainer.max_steps=6", status=2).stderr
    (tmp_path / "away").rename(tmp_path / "data")
    gptlab("train", "resume=run", "trainer.max_steps=6", GPTLAB_DATA="elsewhere")  # the folder was saved
    assert json.loads((tmp_path / "run/summary.json").read_text())["data"]["name"] == "shakespeare_char"


def test_types_are_checked_on_a_resume_too(gptlab, tmp_path):
    gptlab("train", *TINY, "hydra.run.dir=run")
    for override in ("trainer.max_steps=abc", "trainer.max_steps=1.5", "data.workers=x"):
        stderr = gptlab("train", "resume=run", override, status=2).stderr
        assert override.partition("=")[0].rpartition(".")[2] in stderr and "Traceback" not in stderr


def test_a_run_cannot_end_before_the_step_that_it_has_reached(gptlab, tmp_path):
    gptlab("train", *TINY, "hydra.run.dir=run")
    for steps in (1, 3):
        stderr = gptlab("train", "resume=run", f"trainer.max_steps={steps}", status=2).stderr
        assert f"trainer.max_steps={steps}: the run has reached step 4 already" in stderr


def test_a_resume_is_not_told_to_change_what_it_may_not(gptlab, tmp_path, stopped):
    """The warm-up is the run's: it may end before it, though no new run may; but no schedule can. A new run is told
    otherwise, and values are checked also where nothing is left to do."""
    stopped(*send(5, signal.SIGTERM), "optim.warmup_steps=9", status=143)
    both = ("resume=run", "trainer.max_steps=8")
    assert "take a larger optim.decay_steps" in gptlab("train", *both, "optim.decay_steps=8", status=2).stderr
    for wrong, said in (("max_time=90", "it must be DD:HH:MM:SS"), ("devices=0", "trainer.devices=0")):
        stderr = gptlab("train", "resume=run", f"trainer.{wrong}", status=2).stderr
        assert said in stderr and "Traceback" not in stderr
    gptlab("train", *both)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 8


def test_a_lost_description_of_a_run_is_made_anew(gptlab, tmp_path):
    """run.json is a record for people; a run must not end because of it."""
    gptlab("train", *TINY, "hydra.run.dir=run")
    for damage in (lambda path: path.unlink(), lambda path: path.write_text('{"command": [')):
        damage(tmp_path / "run/run.json")
        step = json.loads((tmp_path / "run/summary.json").read_text())["steps"]
        gptlab("train", "resume=run", f"trainer.max_steps={step + 2}")
        about = json.loads((tmp_path / "run/run.json").read_text())
        assert about["data"]["name"] == "python_docs" and about["resumed"][0]["step"] == step


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen:
    """A process that a test sends signals to."""
    command = [sys.executable, "-m", "gptlab.train", *SMALL[:-1], "trainer.max_steps=4000", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_sweep_that_is_stopped_lets_its_job_save(tmp_path):
    """Python's own way of waiting kills a child a quarter of a second after Ctrl-C. No further job is started."""
    sweep = start(tmp_path, "-m", "seed=1,2", "trainer.val_every=3000", "hydra.sweep.dir=sweep")
    wait_for(lambda: (tmp_path / "sweep/0/checkpoints/last.ckpt").exists())
    sweep.send_signal(signal.SIGINT)
    said, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130 and "Traceback" not in errors and "the sweep stops here" in errors
    step = torch.load(tmp_path / "sweep/0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"the last checkpoint is of step {step}" in said and "resume=sweep/0" in said
    assert not (tmp_path / "sweep/1").exists()


def test_a_closed_pipe_is_no_reason_to_lose_anything(tmp_path):
    """With `2>&1 | tee log`, Ctrl-C ends tee first."""
    log = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "gptlab.train", *SMALL, "trainer.max_steps=4000", "trainer.val_every=3000"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=log.stdin, stderr=log.stdin)
    log.stdin.close()
    wait_for(lambda: (tmp_path / "run/checkpoints/last.ckpt").exists())
    log.kill()
    log.wait()
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    step = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert f"the last checkpoint is of step {step}" in (tmp_path / "run/train.log").read_text()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """In the middle of a step that does not end."""
    (tmp_path / "endless.py").write_text(
        "import lightning, pathlib, time\n"
        "class Endless(lightning.Callback):\n"
        "    def on_train_batch_start(self, trainer, *rest):\n"
        "        if trainer.global_step == 5:\n"
        "            pathlib.Path('there').touch()\n"
        "            time.sleep(300)\n"
    )
    process = start(tmp_path, "+callbacks.endless._target_=endless.Endless", "hydra.run.dir=run")
    wait_for(lambda: (tmp_path / "there").exists())
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == ""
    assert "interrupted\nat step 5; the last checkpoint is of step 4" in said


def test_a_validation_that_is_done_again_is_logged_once(gptlab, tmp_path, whole, stopped):
    """Stopped in the middle of the validation of step 8; the resumed run logs it, and is killed before it could save
    anything; and once more. Neither metrics.jsonl nor TensorBoard have it twice, and both have what training logged."""
    (tmp_path / "unsaved.py").write_text(
        "import os, pathlib, signal, lightning\n"
        "class Unsaved(lightning.Callback):\n"
        "    def on_validation_end(self, trainer, module):\n"
        "        kills = pathlib.Path('kills')\n"
        "        if trainer.global_step == 9 and module.validated['step'] == 9 and len(kills.read_text()) < 2:\n"
        "            kills.write_text(kills.read_text() + 'x')\n"
        "            for logger in trainer.loggers:\n"
        "                logger.save()\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "kills").write_text("")
    every_9 = ["trainer.val_every=9", "+callbacks.unsaved._target_=unsaved.Unsaved"]  # trains and validates at step 9
    stopped(*every_9, *send(9, signal.SIGTERM, "validation"), status=143)
    resume(gptlab, tmp_path, status=-signal.SIGKILL)
    resume(gptlab, tmp_path, status=-signal.SIGKILL)
    resume(gptlab, tmp_path)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 9, 11]
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 6, 9, 11]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [0, 9, 11]
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 11]


def test_the_last_validation_of_a_run_that_a_callback_ended(gptlab, tmp_path, stopped):
    """As when trainer.max_time is over: such a callback ends a resumed run before Lightning begins it."""
    (tmp_path / "over.py").write_text(
        "import lightning, pathlib\n"
        "class Over(lightning.Callback):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        if trainer.global_step == 6:\n"
        "            pathlib.Path('over').touch()\n"
        "            trainer.should_stop = True\n"
        "    def on_fit_start(self, trainer, module):\n"
        "        trainer.should_stop = pathlib.Path('over').exists()\n"
    )
    stopped("+callbacks.over._target_=over.Over", *send(6, signal.SIGTERM, "validation"), status=143)
    resume(gptlab, tmp_path)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["ended"], summary["last"]["step"]) == (6, "callback", 6)


def test_a_closed_terminal_is_no_reason_to_lose_anything(gptlab, tmp_path, whole, stopped):
    """What the run says then cannot go to the terminal; train.log has it."""
    stopped(*send(5, signal.SIGHUP, "in"), status=129)
    assert "stopped by SIGHUP\nat step 5; the last checkpoint is of step 5" in (tmp_path / "run/train.log").read_text()
    resume(gptlab, tmp_path)
    assert_same_end(tmp_path / "run", whole())


def test_damaged_records_are_named_or_done_without(gptlab, tmp_path):
    """metrics.jsonl is what the run has to show: it is not thrown away unasked. summary.json is made again."""
    (tmp_path / "empty").mkdir()
    for content in ("a: [1", "null", "\x00"):
        (tmp_path / "empty/config.yaml").write_text(content)
        assert "config.yaml is damaged" in gptlab("train", "resume=empty", status=2).stderr
    gptlab("train", *TINY, "hydra.run.dir=run")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text('{"status": "fin')
    gptlab("train", "resume=run")
    assert json.loads((run / "summary.json").read_text())["best"] == summary["best"]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "garbage\n", *lines[1:]]))
    stderr = gptlab("train", "resume=run", "trainer.max_steps=6", status=2).stderr
    assert "metrics.jsonl is damaged" in stderr and "Traceback" not in stderr
    (run / "metrics.jsonl").unlink()
    said = gptlab("train", "resume=run", "trainer.max_steps=6").stdout
    assert "metrics.jsonl is gone: it begins anew, after step 4" in said


def test_a_step_that_was_left_out_is_no_obstacle(gptlab, tmp_path, stopped):
    """Its loss is null in metrics.jsonl; stopped in its validation, TensorBoard is given that again."""
    (tmp_path / "poison.py").write_text(
        "import lightning as L\n"
        "class Poison(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if trainer.global_step == 7:\n"
        "            self.hook = module.model.register_forward_hook(lambda model, ids, logits: logits * float('nan'))\n"
        "    def on_train_batch_end(self, trainer, module, *rest):\n"
        "        if trainer.global_step == 8:\n"
        "            self.hook.remove()\n"
    )
    poison = ["+callbacks.poison._target_=poison.Poison", "optim.skip_nonfinite=1", "trainer.log_every=1"]
    stopped(*poison, *send(8, signal.SIGTERM, "validation"), status=143)
    resume(gptlab, tmp_path)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 12))
    assert [line["step"] for line in metrics(tmp_path / "run") if line.get("train/loss", 0) is None] == [8]


def test_a_resume_does_not_ask_conf(gptlab, tmp_path):
    """Whatever the files say today, or whether they are there: config.yaml in the run folder is what counts."""
    mine = tmp_path / "conf/optim/mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("defaults: [adamw, _self_]\nlr: 0.002\n")
    gptlab("train", "--config-dir", "conf", "optim=mine", *TINY, "hydra.run.dir=run")
    mine.write_text("lr: 7\n")
    gptlab("train", "resume=run", "trainer.max_steps=6")
    shutil.rmtree(tmp_path / "conf")
    gptlab("train", "resume=run", "trainer.max_steps=8")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["optim"]["lr"] == 0.002
    assert all(line["train/lr"] <= 0.002 for line in metrics(tmp_path / "run") if "train/lr" in line)
