"""Pruning by the median of the other jobs: which values count, and that a pruned run stays pruned."""

import json
import logging
from types import SimpleNamespace

import pytest
from composed import composed
from conftest import TINY
from test_callbacks import Data, validated
from test_module import make_module, make_trainer

from gptlab.callbacks.checkpointing import AtomicCheckpointIO, Checkpointing
from gptlab.callbacks.pruning import MedianPruning
from gptlab.errors import UserError
from gptlab.loggers import MetricsFile
from gptlab.run import Metrics
from gptlab.targets import instantiate

DATA = {"name": "letters"}


def add_job(sweep, name, losses, data=DATA, monitor="val/loss"):
    """A job that has logged these, {step: value}."""
    lines = [{"step": 0, "data": data}, *({"step": step, monitor: value} for step, value in losses.items())]
    (sweep / name).mkdir(parents=True)
    (sweep / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def sweep(tmp_path):
    """Five jobs that were validated at steps 0, 2, 4 and 6; at 4 their median is 3."""
    (tmp_path / "sweep.json").write_text("{}")
    for i in range(5):
        add_job(tmp_path, str(i), {0: 5.0, 2: 4.0 + i, 4: 1.0 + i, 6: 0.5})
    return tmp_path


def train(sweep, losses, startup=5, monitor="val/loss", ckpt=None, steps=8):
    """A job whose validations give `losses`, {step: value}, else 4.0; returns its last step and why it ended there."""
    pruning, module = MedianPruning(monitor, startup), make_module()
    name = monitor.removeprefix("val/")
    module.val_metrics.compute = lambda: {"loss": 9.0, name: losses.get(module.trainer.global_step, 4.0)}
    trainer = make_trainer(sweep / "new", steps, callbacks=[pruning, Checkpointing(every=2)], **validated(2),
                           logger=MetricsFile(Metrics(sweep / "new/metrics.jsonl", DATA)), num_sanity_val_steps=-1,
                           enable_checkpointing=True, plugins=[AtomicCheckpointIO()])  # fmt: skip
    trainer.fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return trainer.global_step, pruning.why


def test_it_ends_where_it_is_worse_than_the_median(sweep):
    """At step 0 it is far worse, which says nothing; at 2 its 6.0 is the median itself, and at 4 its 3.1 is above 3."""
    step, why = train(sweep, {0: 99.0, 2: 6.0, 4: 3.1})
    assert step == 4
    assert why == "val/loss 3.1000 is worse than 3.0000, the median of 5 other jobs at this step"


def test_a_pruned_run_stays_pruned(sweep):
    """Killed before its summary, it is resumed: nothing more is computed, though nobody is there to compare with."""
    losses = {2: 1.0, 4: 3.1}
    ended = train(sweep, losses)
    (sweep / "sweep.json").unlink()
    assert ended[0] == 4 and train(sweep, losses, ckpt=sweep / "new/checkpoints/last.ckpt") == ended


@pytest.mark.parametrize("case", ["few", "other data", "no sweep", "elsewhere", "last step"])
def test_it_trains_to_the_end(sweep, case, caplog):
    """With fewer jobs than `startup` at a step, jobs on other data, or outside a sweep, worse values end nothing; nor does
    one at the last step, where the run is complete."""
    if case == "few":  # five jobs, but one was ended in step 3, and another one's loss was not finite
        for name, losses in (("0", {2: 0.1}), ("1", {2: None, 4: None, 6: None})):
            (sweep / name / "metrics.jsonl").unlink()
            (sweep / name).rmdir()
            add_job(sweep, name, losses)
    elif case == "other data":
        for i in range(5):
            path = sweep / f"{i}/metrics.jsonl"
            path.write_text(path.read_text().replace("letters", "words"))
    elif case == "no sweep":
        (sweep / "sweep.json").unlink()
    elif case == "elsewhere":
        (sweep / "sweep.json").rename(sweep / "0/sweep.json")
    with caplog.at_level(logging.INFO):
        assert train(sweep, {2: 4.0, 4: 1.0} if case == "last step" else {}, steps=6) == (6, None)
    assert ("not a job of a sweep" in caplog.text) == (case in ("no sweep", "elsewhere"))


def test_a_higher_accuracy_is_better(sweep):
    for i in range(5):
        add_job(sweep, f"{5 + i}", {2: 0.5, 4: 0.1 * i}, monitor="val/accuracy")
    assert train(sweep, {2: 0.9, 4: 0.1}, monitor="val/accuracy")[0] == 4


def test_a_loss_that_is_not_finite_is_worse(sweep):
    assert train(sweep, {2: float("nan")}) == (
        2,
        "val/loss nan is worse than 6.0000, the median of 5 other jobs at this step",
    )


DAMAGE = (b"{\n", b"[1]\n", b'{"val/loss": 1.0}\n', b"\xff\n", b"[" * 100_000 + b"\n",
          b'{"step": 4, "val/loss": "x"}\n', b'{"step": 4, "val/lo')  # fmt: skip


def test_damaged_metrics_of_other_jobs_are_left_out(sweep):
    """Or a line that a kill has cut, or what is no file. The five whole jobs decide."""
    for i, damage in enumerate(DAMAGE):
        add_job(sweep, f"damaged{i}", {})
        with open(sweep / f"damaged{i}/metrics.jsonl", "ab") as file:
            file.write(damage)
    (sweep / "a folder/metrics.jsonl").mkdir(parents=True)
    assert "of 5 other jobs" in train(sweep, {2: 1.0, 4: 3.1})[1]


def test_the_first_process_decides_for_all(sweep):
    """Another process, which may see other files, takes its verdict."""
    pruning = MedianPruning("val/loss", 1)
    trainer = SimpleNamespace(sanity_checking=False, should_stop=False, is_global_zero=False, default_root_dir=sweep / "0",
                              strategy=SimpleNamespace(broadcast=lambda why: why or "the first one's"))  # fmt: skip
    pruning.on_validation_end(trainer, SimpleNamespace(validated={"val/loss": 0.0}))
    assert trainer.should_stop and pruning.why == "the first one's"


def test_a_metric_that_is_not_measured_is_refused_at_step_0(sweep):
    trainer = SimpleNamespace(sanity_checking=True)
    with pytest.raises(UserError, match=r"callbacks.median_pruning.monitor=val/accuracy: .* does not measure it"):
        MedianPruning("val/accuracy", 1).on_validation_end(trainer, SimpleNamespace(validated={"val/loss": 0.0}))


@pytest.mark.slow
def test_a_run_says_and_records_that_it_was_pruned(gptlab, tmp_path):
    """As a user starts a job; a resume leaves it alone, though it could train longer."""
    data = instantiate("data", composed("train", "data=sort")[0]["data"], seed=0)
    data.setup("fit")
    (sweep := tmp_path / "sweep").mkdir()
    (sweep / "sweep.json").write_text("{}")
    for i in range(5):
        add_job(sweep, str(i), {2: 1e-9}, data.record)
    done = gptlab(
        "train",
        *TINY,
        "data=sort",
        "callbacks=[problems,median_pruning]",
        "callbacks.sample_text=null",
        "hydra.run.dir=sweep/5",
    )
    summary = json.loads((sweep / "5/summary.json").read_text())
    assert (summary["ended"], summary["steps"]) == ("pruned", 2) and "stopped at step 2: val/loss" in done.stdout
    again = gptlab("train", "resume=sweep/5", "trainer.max_steps=9").stdout
    assert f"this run is finished: {summary['why']}" in again
