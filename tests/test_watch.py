"""What is said of a run's health, from losses and gradient norms alone."""

import json
import logging
import math
import random

import pytest

from gptlab.watch import OVERFLOW, Diverged, Watch


def noise(steps: int, seed: int = 1) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(2 + 3 * math.exp(-step / 100) + rng.gauss(0, 0.1), 0.5) for step in range(steps)]


def test_a_falling_noisy_loss_is_no_spike_and_a_jump_is_one(caplog):
    """Ten runs of 1,000 steps; then one loss of 9 where 2 is usual, and a jump that stays."""
    for seed in range(10):
        watch, rows = Watch(1.0, 0), noise(1000, seed)
        watch.look(1000, rows)
        assert watch.spike is None and caplog.text == ""
    watch.look(1001, [(9.0, 0.5)])
    assert "step 1001: the loss jumped to 9.0000, from about 2.0" in caplog.text
    assert watch.interval([(9.0, 0.5)])["train/loss_spike"] == 9.0
    assert "train/loss_spike" not in watch.interval([(2.0, 0.5)])
    caplog.clear()
    watch.look(1301, [(5.0, 0.5)] * 300)
    assert 1 <= caplog.text.count("jumped") < 100  # it has become the usual loss


def test_each_step_is_looked_at_once_wherever_the_run_was_left():
    """Rows are given again after a resume, and by a look between two logs: nothing is counted twice."""
    rows = [(2.0, 0.5), (2.0, 3.0), (2.0, 0.5), (2.0, 3.0)]
    once, twice = Watch(1.0, 0), Watch(1.0, 0)
    once.look(4, rows)
    twice.look(2, rows[:2])
    again = Watch(1.0, 0)
    again.load(json.loads(json.dumps(twice.state())))
    again.look(4, rows)
    again.look(4, rows)
    assert again == once and once.steps == 4


@pytest.mark.parametrize("bad", [(math.nan, math.nan), (math.inf, 1.0), (2.0, math.inf), (2.0, -math.inf)])
def test_as_many_steps_as_allowed_are_skipped_and_the_next_ends_the_run(bad, caplog):
    watch = Watch(1.0, may_skip=2)
    watch.look(6, [(2.0, 0.5), bad, (2.0, 0.5), bad, (2.0, 0.5), (2.0, 0.5)])
    assert "step 2: the loss is" in caplog.text and "step 4: " in caplog.text and "(2 of at most 2" in caplog.text
    assert watch.steps == 4 and watch.skipped == 2
    with pytest.raises(Diverged, match=r"step 7: .*data.train_steps\(0, 1\)\[6\].*optim.skip_nonfinite=3"):
        watch.look(7, [bad])


def test_interval_means_leave_out_what_is_not_finite_and_what_overflowed():
    """An overflow of fp16 is the scaler's business: no step that is skipped here."""
    rows = [(2.0, 0.5), (math.nan, math.nan), (3.0, OVERFLOW), (4.0, 1.5)]
    watch = Watch(1.0, 1)
    watch.look(4, rows)
    assert watch.skipped == 1
    assert watch.interval(rows) == {"train/loss": 3.0, "train/grad_norm": 1.0, "train/clipped_share": 0.25}


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog):
    caplog.set_level(logging.WARNING)
