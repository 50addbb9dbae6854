"""Disks, files and folders that fail, are damaged, or belong to another run."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DROPOUT, TINY, assert_same_end
from gptlab.run_folder import RunFolder
from omegaconf import OmegaConf

from gptlab import checkpoint, resume
from gptlab import run as runs

RUN = [*DROPOUT, "trainer.checkpoint_every=3", "hydra.run.dir=run"]
FULL = """
import errno, os, pathlib, lightning, torch
from gptlab.callbacks import checkpointing

class Full(lightning.Callback):
    \"\"\"After so many steps, there is room for half a checkpoint only.\"\"\"
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 9 and not pathlib.Path("space-was-made").exists():
            checkpointing.torch.save = self.save

    def save(self, content, file):
        file.write(b"half" * 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "gptlab.train", *RUN]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder / "run"


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
    """A copy of the run as it would be after a kill between its last checkpoint and its summary. (The files of
    checkpoints that were one are one again.)"""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    (run / "checkpoints/best.ckpt").unlink()
    os.link(run / "checkpoints/last.ckpt", run / "checkpoints/best.ckpt")
    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    """In the middle of the weights, where torch's reader does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("damage", [cut, empty, flip_a_bit])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(gptlab, finished, stopped, damage):
    """Said, set aside under another name, and the end is bitwise the same."""
    saved = stopped / "checkpoints"
    assert checkpoint.read(saved / "previous.ckpt")["global_step"] == 9
    damage(saved / "last.ckpt")
    said = gptlab("train", "resume=run").stdout
    assert "last.ckpt is not a checkpoint of gptlab, or it is damaged" in said
    assert "going on from previous.ckpt, of step 9" in said
    assert {"last.ckpt.damaged", "best.ckpt.damaged"} <= {path.name for path in saved.iterdir()}
    assert_same_end(stopped, finished)


def test_when_both_are_damaged_nothing_is_touched(gptlab, stopped):
    for name in ("last", "previous"):
        cut(stopped / f"checkpoints/{name}.ckpt")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    stderr = gptlab("train", "resume=run", status=2).stderr
    assert "last.ckpt" in stderr and "previous.ckpt" in stderr and "start a new run" in stderr
    assert all(path.read_bytes() == content or path.name in (".lock", "train.log") for path, content in before.items())


def test_lost_checkpoints_are_no_reason_to_begin_anew(gptlab, stopped):
    """That would write over what the run has logged, and say that nothing had ever been saved."""
    shutil.rmtree(stopped / "checkpoints")
    logged = (stopped / "metrics.jsonl").read_bytes()
    stderr = gptlab("train", "resume=run", status=2).stderr
    assert "holds no checkpoint any more, and the run has had some" in stderr
    assert (stopped / "metrics.jsonl").read_bytes() == logged
    (stopped / ".saved").unlink()
    assert "going on at step 0: nothing was saved yet" in gptlab("train", "resume=run").stdout


def test_a_run_that_saves_nothing_says_so(gptlab, tmp_path):
    """A callback chosen alone leaves out the others, and the one that saves with them. Such a run begins anew."""
    (tmp_path / "c/callbacks").mkdir(parents=True)
    (tmp_path / "c/callbacks/mine.yaml").write_text("mine: {_target_: lightning.Callback}\n")
    plain = [argument for argument in TINY if not argument.startswith("callbacks.")]
    for run, choice in (("alone", "callbacks=mine"), ("added", "callbacks=[default,mine]"), ("none", "~callbacks")):
        said = gptlab("train", *plain, "--config-dir", "c", choice, f"hydra.run.dir={run}").stdout
        assert ("NO CHECKPOINT" in said) == (run != "added")
        assert (tmp_path / run / "checkpoints").exists() == (run == "added")
    (tmp_path / "none/summary.json").unlink()
    assert "going on at step 0" in gptlab("train", "resume=none").stdout


def test_without_the_last_checkpoints_the_best_one_is_gone_on_from(gptlab, finished, stopped):
    """It holds all that the others do; here it is that of step 8."""
    saved = stopped / "checkpoints"
    shutil.copy(finished / "checkpoints/previous.ckpt", saved / "best.ckpt.new")
    (saved / "best.ckpt.new").rename(saved / "best.ckpt")
    cut(saved / "previous.ckpt")
    (saved / "last.ckpt").unlink()
    said = gptlab("train", "resume=run").stdout
    assert "previous.ckpt is not a checkpoint" in said and "going on from best.ckpt, of step 9" in said
    assert_same_end(stopped, finished)
    assert not list(saved.glob("*.tmp"))


def test_a_full_disk_leaves_the_checkpoints_there_were(gptlab, tmp_path, finished):
    """At step 9, whose checkpoint is half written: last.ckpt is that of step 8 still, and previous.ckpt that of 6."""
    (tmp_path / "full.py").write_text(FULL)
    done = gptlab("train", *RUN, "+callbacks.full._target_=full.Full", status=1, PYTHONPATH=str(tmp_path))
    assert "ERROR: [Errno 28] No space left on device" in done.stdout and done.stderr == ""
    assert "at step 9; the last checkpoint is of step 8" in done.stdout
    saved = tmp_path / "run/checkpoints"
    steps = {path.name: checkpoint.read(path)["global_step"] for path in saved.iterdir()}
    assert steps == {"last.ckpt": 8, "previous.ckpt": 6, "best.ckpt": 8}
    (tmp_path / "space-was-made").touch()
    gptlab("train", "resume=run", PYTHONPATH=str(tmp_path))
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys, number):
    """Said before anything else is done. (Tests may run as root, who may write anywhere.)"""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs, "open", refuse, raising=False)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path / "run")}}, "resume": None})
    with pytest.raises(SystemExit) as ended:
        RunFolder().on_run_start(config)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"cannot be written to ({os.strerror(number)})" in said and "hydra.run.dir" in said


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_files_of_a_users_own_are_not_written_over(gptlab, tmp_path, name):
    """Such as the config.yaml of another program, where a run is sent into the project's folder."""
    (tmp_path / name).write_text("mine")
    assert f"holds a run already ({name})" in gptlab("train", *TINY, "hydra.run.dir=.", status=2).stderr
    assert (tmp_path / name).read_text() == "mine"


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(stopped, monkeypatch):
    """It would be set aside, and an older one gone on from. (Tests may run as root, who may read anything.)"""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint, "check_bytes", refuse)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt cannot be read: Permission denied"):
        resume.last_state(stopped)
    assert (stopped / "checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("name", ["run", "train.log", "checkpoints"])
def test_a_file_that_cannot_be_written_to(stopped, monkeypatch, capsys, name):
    """A resume may not be told to give another folder."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(stopped)}}, "resume": str(stopped)})
    with pytest.raises(SystemExit):
        RunFolder().on_run_start(config)
    runs._locks.pop().close()
    said = capsys.readouterr().err
    assert (
        f"{stopped if name == 'run' else stopped / name} cannot be written to (Permission denied)" in said
        and "hydra.run.dir" not in said
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.n_layer", 2, "model.n_layer is 2 in it, and 3 in config.yaml"),
        ("optim.lr", 0.5, "optim.lr is 0.5 in it, and 0.001 in config.yaml"),
        ("seed", 5, "seed is 5 in it, and 1337 in config.yaml"),
        ("data.name", "b", "data.name is b in it, and python_docs in config.yaml"),
        ("callbacks.ema", {"decay": 0.9}, "callbacks.ema.decay is 0.9 in it, and None in config.yaml"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(stopped, key, value, said):
    """The one of this run is taken; what a resume may change, may differ."""
    resolved = yaml.safe_load((stopped / "config.yaml").read_text())
    path = stopped / "checkpoints/last.ckpt"
    saved = checkpoint.read(path)
    saved["config"]["trainer"]["max_steps"] = 99
    resume.check_same_run(path, saved, resolved)
    *groups, last = key.split(".")
    node = saved["config"]
    for group in groups:
        node = node[group]
    node[last] = value
    with pytest.raises(ValueError, match=said):
        resume.check_same_run(path, saved, resolved)


def test_what_is_looked_at_before_a_resume_does_not_stay_in_memory(stopped):
    """The checkpoint's tensors, three times the model, would lie beside the run's own until its end."""
    _, saved = resume.last_state(stopped)
    assert saved["global_step"] == 11 and saved["config"]["model"]["n_layer"] == 3
    assert not any(isinstance(value, torch.Tensor) for _, value in resume.leaves(saved))


def test_a_copied_checkpoint_ends_as_an_error_text(gptlab, stopped):
    path = stopped / "checkpoints/last.ckpt"
    saved = checkpoint.read(path)
    saved["config"]["model"]["n_layer"] = 2
    path.unlink()  # it is best.ckpt, too
    torch.save(saved, path)
    stderr = gptlab("train", "resume=run", status=2).stderr
    assert "model.n_layer is 2 in it, and 3 in config.yaml" in stderr and "Traceback" not in stderr


def test_other_data_under_the_same_config_are_refused(gptlab, tmp_path):
    """What the config says of them is the same; their checksum is not."""
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 300)
    text = ["data=text", "data.path=a.txt", "data.block_size=64", "data.batch_size=12", "hydra.run.dir=run"]
    gptlab("train", *TINY, *text)
    (tmp_path / "a.txt").write_text("to be or not to be, that was the question\n" * 300)
    assert "trained on other data" in gptlab("train", "resume=run", "trainer.max_steps=9", status=2).stderr


def test_of_two_runs_that_want_one_folder_one_gets_it(tmp_path):
    """Started together, twice: one trains, the other is refused before Hydra writes anything, so what lies in the folder
    is of one run."""
    for attempt in range(2):
        command = [sys.executable, "-m", "gptlab.train", *TINY, f"hydra.run.dir=run{attempt}"]
        both = [
            subprocess.Popen(
                [*command, f"seed={seed}"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for seed in (1, 2)
        ]
        errors = [process.communicate(timeout=300)[1].decode() for process in both]
        assert sorted(process.returncode for process in both) == [0, 2]
        loser = next(i for i, process in enumerate(both) if process.returncode == 2)
        assert "is being written to by another process" in errors[loser] or "holds a run already" in errors[loser]
        run = tmp_path / f"run{attempt}"
        seeds = [yaml.safe_load((run / name).read_text())["seed"] for name in ("config.yaml", ".hydra/config.yaml")]
        assert seeds == [2 - loser] * 2 and json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_a_run_that_goes_on_is_not_resumed_a_second_time(gptlab, stopped):
    runs.lock(stopped)
    stderr = gptlab("train", "resume=run", status=2).stderr
    assert f"another process ({os.getpid()} on " in stderr
    runs._locks.pop().close()
    gptlab("train", "resume=run")


PAIRS = """
import torch
from gptlab.data.text import TextData

class Pairs(TextData):
    \"\"\"Inputs and targets, as minGPT's data sets yield them: not even shifted.\"\"\"
    def val_batches(self, *sizes):
        return [(ids, ids) for ids, _ in map(super().val_batches(*sizes).__getitem__, range(1))]
"""


def test_pairs_of_inputs_and_targets_are_refused(gptlab, tmp_path):
    """With minGPT, a data set that forgets to shift trains a model that copies its input, at a loss near 0."""
    (tmp_path / "pairs.py").write_text(PAIRS)
    own = [*TINY, "data._target_=pairs.Pairs", "hydra.run.dir=run"]
    stderr = gptlab("train", *own, status=2, PYTHONPATH=str(tmp_path)).stderr
    assert "the data set yields pairs, such as inputs and targets" in stderr and "Traceback" not in stderr


HUGE = """
import numpy as np
from gptlab.data.text import TextData
from gptlab.tokenizer import CharTokenizer

class TenMillion(CharTokenizer):
    vocab_size = property(lambda self: 10_000_000, lambda self, size: None)

    def token_bytes(self):
        return np.ones(self.vocab_size, np.int64)

class Huge(TextData):
    def setup(self, stage):
        super().setup(stage)
        self.tokenizer = TenMillion(self.tokenizer.chars)
"""


def test_ten_million_tokens_are_refused_with_the_numbers(gptlab, tmp_path):
    """Before anything is allocated: a machine that has 60 GiB for the weights of this would start to write them."""
    (tmp_path / "huge.py").write_text(HUGE)
    began = time.monotonic()
    own = ["hardware=cpu", "model=gpt2-xl", "data._target_=huge.Huge", "hydra.run.dir=run"]
    stderr = gptlab("train", *own, status=2, PYTHONPATH=str(tmp_path)).stderr
    assert time.monotonic() - began < 60
    assert "(parameters 65.1 GiB, gradients 65.1 GiB, optimizer state 130 GiB, activations" in stderr
    assert "the model is too large" in stderr and "a smaller vocabulary" in stderr
