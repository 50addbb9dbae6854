"""scripts/kill_storm.py: a short storm on the real program; and its checks of files and results can fail."""

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
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))
END = {"w": torch.tensor([0.0, 1.0]), "steps": [(1, 0.1), (2, 0.2)], "best": {"loss": 1.0}}


@pytest.mark.parametrize(
    "changes, path",
    [
        ({"w": torch.tensor([-0.0, 1.0])}, "/w"),
        ({"w": torch.tensor([0.0, 1.0]).nextafter(torch.tensor(2.0))}, "/w"),
        ({"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}, "/w"),
        ({"steps": [(1, 0.1), (2, 0.1 + 0.1 + 1e-16)]}, "/steps/1/1"),
        ({"best": {"loss": 1}}, "/best/loss"),
        ({"best": {"loss": 1.0, "step": 3}}, "/best/step"),
    ],
)
def test_the_last_bit_of_any_value_is_a_difference(changes, path):
    """Else a storm would call results the same that are merely close."""
    differences = SCRIPT_NAMES["differences"]
    assert differences(END, {**END, "w": END["w"].clone()}) == []
    assert path in differences(END, {**END, **changes})


def test_broken_files_of_a_run_are_seen(gptlab, tmp_path):
    """One wrong byte among the weights; a line of metrics, not the last, without its end; half a run.json."""
    check_files = SCRIPT_NAMES["check_files"]
    gptlab("train", *TINY, "hydra.run.dir=run")
    run = tmp_path / "run"
    assert check_files(run) == 4
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')  # what a kill can leave, and a resume drops
    assert check_files(run) == 4
    for name, damage in (
        ("checkpoints/previous.ckpt", lambda content: content[:-100_000] + b"?" + content[-99_999:]),
        ("metrics.jsonl", lambda content: content.replace(b"}\n", b"\n", 1)),
        ("run.json", lambda content: content[: len(content) // 2]),
    ):
        shutil.copy(run / name, tmp_path / "intact")
        (run / name).write_bytes(damage((run / name).read_bytes()))
        with pytest.raises(SystemExit, match="a broken file"):
            check_files(run)
        shutil.copy(tmp_path / "intact", run / name)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["data.workers=2"]])
def test_a_run_survives_a_short_storm(tmp_path, overrides):
    """Killed three times in training, once in a validation and twice in a checkpoint write, the run ends bitwise as the
    uninterrupted one. Without atomic files, or with a resume that repeats or omits a step, a line or a draw of dropout,
    it would not."""
    command = [sys.executable, str(SCRIPT), "--steps=410", "--kills", "3", "1", "2", "--start-ups=1", *overrides]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 kills: no file was ever broken" in done.stdout
