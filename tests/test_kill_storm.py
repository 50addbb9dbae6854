"""scripts/kill_storm.py: a short storm on the real program, and that its looks at a run's files and end can fail."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY

SCRIPT = Path(__file__).parents[1] / "scripts/kill_storm.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_the_last_bit_of_any_value_is_a_difference(script):
    """Else a storm would call an end the same that is merely close."""
    next_after_one = torch.tensor([0.0, 1.0]).nextafter(torch.tensor(2.0))
    end = {"w": torch.tensor([0.0, 1.0]), "steps": [(1, 0.1), (2, 0.2)], "best": {"loss": 1.0}}
    assert script["differences"](end, {**end, "w": end["w"].clone()}) == []
    for other, place in (
        ({**end, "w": torch.tensor([-0.0, 1.0])}, "/w"),
        ({**end, "w": next_after_one}, "/w"),
        ({**end, "w": end["w"].double()}, "/w"),
        ({**end, "steps": [(1, 0.1), (2, 0.1 + 0.1 + 1e-16)]}, "/steps/1/1"),
        ({**end, "best": {"loss": 1}}, "/best/loss"),
        ({**end, "best": {"loss": 1.0, "step": 3}}, "/best/step"),
    ):
        assert place in script["differences"](end, other)


def test_broken_files_of_a_run_are_seen(script, gptlab, tmp_path):
    """One wrong byte among the weights, a line of metrics without its end that is not the last, half a run.json."""
    gptlab("train", *TINY, "hydra.run.dir=run")
    run = tmp_path / "run"
    assert script["whole_files"](run) == 4
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')  # what a kill can leave, and a resume drops
    assert script["whole_files"](run) == 4
    for name, damage in (
        ("checkpoints/previous.ckpt", lambda content: content[:-100_000] + b"?" + content[-99_999:]),
        ("metrics.jsonl", lambda content: content.replace(b"}\n", b"\n", 1)),
        ("run.json", lambda content: content[: len(content) // 2]),
    ):
        shutil.copy(run / name, tmp_path / "whole")
        (run / name).write_bytes(damage((run / name).read_bytes()))
        with pytest.raises(SystemExit, match="a broken file"):
            script["whole_files"](run)
        shutil.copy(tmp_path / "whole", run / name)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["data.workers=2"]])
def test_a_run_survives_a_short_storm(tmp_path, settings):
    """Killed at three moments of training, in a validation and in two checkpoint writes, its end is bitwise that of the
    untouched run. Without atomic files, or with a resume that repeats or leaves out a step, a line or a draw of
    dropout, it would not be."""
    command = [sys.executable, str(SCRIPT), "--steps=410", "--kills", "3", "1", "2", "--start-ups=1", *settings]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # where it works
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 kills: no file was ever broken" in done.stdout
