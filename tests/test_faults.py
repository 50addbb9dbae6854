"""Disks, files and folders that fail, are damaged, or belong to another run."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DROPOUT, TINY, assert_same_end

from gptlab import checkpoint, resume
from gptlab.data.windows import ids_and_mask
from gptlab.errors import UserError
from gptlab.run import Run

RUN = [*DROPOUT, "trainer.checkpoint_every=3", "hydra.run.dir=run"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "gptlab.train", *RUN]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return folder / "run"


@pytest.fixture
def stopped(finished, tmp_path) -> Path:
    """A copy of the run as a kill between its last checkpoint and its summary leaves it. (Checkpoints that were one file
    are one again.)"""
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
    """Said, kept under another name, and the end is bitwise the same."""
    saved = stopped / "checkpoints"
    assert checkpoint.read(saved / "previous.ckpt")["global_step"] == 9
    damage(saved / "last.ckpt")
    if damage is not flip_a_bit:
        assert resume.find_state(Run(stopped))[0] == saved / "previous.ckpt"
    else:
        said = gptlab("train", "resume=run").stdout
        assert "last.ckpt is damaged, or not a checkpoint" in said and "resuming from previous.ckpt, of step 9" in said
        assert_same_end(stopped, finished)
    assert {"last.ckpt.damaged", "best.ckpt.damaged"} <= {path.name for path in saved.iterdir()}


def test_without_the_last_checkpoints_the_best_one_is_used(gptlab, finished, stopped):
    """It holds all that the others do; here it is that of step 9."""
    saved = stopped / "checkpoints"
    shutil.copy(finished / "checkpoints/previous.ckpt", saved / "best.ckpt.new")
    (saved / "best.ckpt.new").rename(saved / "best.ckpt")
    cut(saved / "previous.ckpt")
    (saved / "last.ckpt").unlink()
    said = gptlab("train", "resume=run").stdout
    assert "previous.ckpt is damaged" in said and "resuming from best.ckpt, of step 9" in said
    assert_same_end(stopped, finished)
    assert not list(saved.glob("*.tmp"))


def test_when_all_are_damaged_nothing_is_touched(stopped):
    for name in ("last", "previous"):
        cut(stopped / f"checkpoints/{name}.ckpt")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"(?s)last\.ckpt is damaged.*previous\.ckpt is damaged.*start a new run"):
        resume.find_state(Run(stopped))
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_lost_checkpoints_are_no_reason_to_restart(stopped):
    """That would overwrite what the run logged, and say that nothing had ever been saved."""
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(UserError, match="has lost its checkpoints; restore them, or start a new run"):
        resume.find_state(Run(stopped))
    (stopped / ".saved").unlink()
    assert resume.find_state(Run(stopped)) == (None, {})


def test_a_checkpoint_without_read_permission_is_not_damaged(stopped, monkeypatch):
    """It would be renamed, and an older one used. (Tests may run as root, who may read anything.)"""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint, "check_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read \S*last\.ckpt: Permission denied"):
        resume.find_state(Run(stopped))
    assert (stopped / "checkpoints/last.ckpt").exists()


def test_a_run_that_saves_nothing_says_so(gptlab, tmp_path):
    """It restarts from step 0."""
    quiet = [argument for argument in TINY if not argument.startswith("callbacks.")]
    assert "NO CHECKPOINT" in gptlab("train", *quiet, "~callbacks", "hydra.run.dir=none").stdout
    assert not (tmp_path / "none/checkpoints").exists()
    (tmp_path / "none/summary.json").unlink()
    assert "resuming at step 0" in gptlab("train", "resume=none", "trainer.checkpoint_every=5").stdout


def test_a_full_disk_leaves_the_checkpoints_there_were(gptlab, tmp_path, finished):
    """At step 9, whose checkpoint is half written: last.ckpt is that of step 8 still, and previous.ckpt that of 6."""
    here = str(Path(__file__).parent)
    done = gptlab("train", *RUN, "+callbacks.full._target_=disturb.FullDisk", status=1, PYTHONPATH=here)
    assert "ERROR: [Errno 28] No space left on device" in done.stdout and done.stderr == ""
    assert "at step 9; the last checkpoint is of step 8" in done.stdout
    saved = tmp_path / "run/checkpoints"
    steps = {path.name: checkpoint.read(path)["global_step"] for path in saved.iterdir()}
    assert steps == {"last.ckpt": 8, "previous.ckpt": 6, "best.ckpt": 8}
    gptlab("train", "resume=run", "trust=true", PYTHONPATH=here)
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.n_layer", 2, "model.n_layer=2 in the checkpoint, 3 in config.yaml"),
        ("optim.lr", 0.5, "optim.lr=0.5 in the checkpoint, 0.001 in config.yaml"),
        ("seed", 5, "seed=5 in the checkpoint, 1337 in config.yaml"),
        ("data.name", "b", "data.name=b in the checkpoint, python_docs in config.yaml"),
        ("callbacks.ema", {"decay": 0.9}, "callbacks.ema.decay=0.9 in the checkpoint, None in config.yaml"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(stopped, key, value, said):
    """The one of this run is taken; what a resume may change, may differ. None of its tensors stays in memory."""
    path, state = resume.find_state(Run(stopped))
    now = (Run(stopped).read_config(), state["data"], state["tokenizer"])
    assert state["global_step"] == 11
    assert not any(isinstance(value, torch.Tensor) for _, value in resume.leaf_values(state))
    state["config"]["trainer"]["max_steps"] = 99
    resume.check_same_run(path, state, *now)
    with pytest.raises(UserError, match="restore it, or start a new run"):
        resume.check_same_run(path, state, now[0], {**now[1], "sha256": "other"}, now[2])
    with pytest.raises(UserError, match="the tokenizer of data=python_docs changed"):
        resume.check_same_run(path, state, now[0], now[1], {**now[2], "chars": "ab"})
    *groups, last = key.split(".")
    node = state["config"]
    for group in groups:
        node = node[group]
    node[last] = value
    with pytest.raises(UserError, match=said):
        resume.check_same_run(path, state, *now)


def test_a_checkpoint_of_an_older_gptlab_is_not_resumed(stopped):
    path = stopped / "checkpoints/last.ckpt"
    saved = {key: value for key, value in checkpoint.read(path).items() if key != "watch"}
    torch.save(saved, path)
    with pytest.raises(UserError, match="was saved by an older gptlab; it can be sampled, not resumed"):
        resume.find_state(Run(stopped))


def test_of_two_runs_that_want_one_folder_one_gets_it(tmp_path):
    """Started together: one trains, the other is refused before Hydra writes anything, so what lies in the folder is of
    one run."""
    command = [sys.executable, "-m", "gptlab.train", *TINY, "hydra.run.dir=run"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    both = [subprocess.Popen([*command, f"seed={seed}"], cwd=tmp_path, **streams) for seed in (1, 2)]
    errors = [process.communicate(timeout=300)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    loser = next(i for i, process in enumerate(both) if process.returncode == 2)
    assert "locked by process" in errors[loser] or "already holds a run" in errors[loser]
    files = [(tmp_path / "run" / name).read_text() for name in ("config.yaml", ".hydra/config.yaml")]
    assert [yaml.safe_load(text)["seed"] for text in files] == [2 - loser] * 2
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_pairs_of_inputs_and_targets_are_refused():
    """With minGPT, a data set that forgets to shift trains a model that copies its input, at a loss near 0."""
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match="the data set yields pairs, such as inputs and targets"):
        ids_and_mask((ids, ids))
