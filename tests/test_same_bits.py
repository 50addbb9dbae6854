"""scripts/same_bits.py: tells a version that rounds differently from one that does not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_change_in_the_last_digits_is_a_difference(tmp_path):
    """The learning rate of the copy differs by 1e-7 of itself after the warm-up: no loss shows that at first, bits do."""
    for name in ("gptlab", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name)
    optim = tmp_path / "gptlab/optim.py"
    assert "math.pi" in optim.read_text()
    optim.write_text(optim.read_text().replace("math.pi", "math.pi * (1 - 1e-7)"))
    command = [sys.executable, str(ROOT / "scripts/same_bits.py"), str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) == 6 and not any(row.endswith("none") for row in rows)
