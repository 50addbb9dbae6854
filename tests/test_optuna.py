"""Sweeps that Optuna leads. Where a test is not slow, a function of the values plays the training runs."""

import functools
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from composed import composed
from conftest import TINY, metrics
from omegaconf import OmegaConf

import gptlab
from gptlab import config, jobs, sweep
from gptlab.errors import UserError
from gptlab.run import ERROR, Run

optuna = pytest.importorskip("optuna", reason="needs pip install 'gptlab[optuna]'")
import hydra_plugins.gptlab as plugin  # noqa: E402

from gptlab import search  # noqa: E402

LR, N_LAYER = "++optim.lr=tag(log,interval(1e-4,1e-2))", "++model.n_layer=int(interval(1,4))"


class Kill(BaseException):
    """In the place of SIGKILL."""


def compose(overrides):
    values, references = composed("train")
    given = [override.lstrip("+").partition("=") for override in overrides if not override.startswith("sweep=")]
    for key, _, value in given:
        values = config.with_value(values, key, yaml.safe_load(value))
    return config.validate(values, "train", references - {key for key, _, _ in given})


def loss(values) -> float:
    return (math.log10(values.get("optim.lr", 1e-3)) + 3) ** 2 + values.get("model.n_layer", 1) / 8


class Sweeps:
    """Sweeps in this process; a database is an object that stays when they are killed."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.runs, self.moments, self.kill_at = folder, [], 0, math.inf
        self.become = lambda values: loss(values)  # or why a run failed or was pruned
        databases = {}
        create_study = optuna.create_study

        def create(storage=None, **options):
            if isinstance(storage, str):
                storage = databases.setdefault(storage, optuna.storages.InMemoryStorage())
            return create_study(storage=storage, **options)

        monkeypatch.setattr(search.optuna, "create_study", create)
        monkeypatch.setattr(jobs, "run", self.run_jobs)
        for owner, name in ((search.Study, "propose"), (search.Study, "tell"), (sweep.Sweep, "write")):
            monkeypatch.setattr(owner, name, self.with_moments(getattr(owner, name)))

    def with_moments(self, function):
        """A kill may come before and after it."""

        def wrapper(*arguments):
            self.moment()
            function(*arguments)
            self.moment()

        return wrapper

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.kill_at:
            raise Kill

    def run_jobs(self, processes, n_jobs, **_) -> None:
        for process in processes:
            (values,) = [
                job.values for job in sweep.Sweep.read(process.folder.parent).jobs if job.folder == process.folder.name
            ]
            self.runs.append(values)
            process.folder.mkdir(exist_ok=True)
            self.moment()
            (process.folder / "config.yaml").write_text("trainer: {threads: 1, devices: 1, max_steps: 4}")
            self.moment()
            end = self.become(values)
            if end == "failed":
                (process.folder / ERROR).write_text("it failed")
            else:
                ended = end if isinstance(end, str) else "max_steps"
                last = {"val/loss": None if isinstance(end, str) else end}
                Run(process.folder).write_summary({"steps": 4, "ended": ended, "why": None, "best": last, "last": last})
            self.moment()

    def start(self, *arguments, n_trials=12, resume=False, name="sweep", launcher=None, seed=1, **options):
        sweep.current = sweep.replayed = None
        folder = self.folder / name
        if resume:
            sweep.replay(folder, list(arguments))
            arguments = sweep.replayed.overrides
        sweeper = plugin.Optuna(n_trials=n_trials, **options)
        sweeper.loader, sweeper.entry, sweeper.compose = None, "train", compose
        hydra = {
            "sweep": {"dir": str(folder)},
            "overrides": {"hydra": []},
            "launcher": {},
            "job": {"config_name": "train"},
        }
        sweeper.config = OmegaConf.create({"seed": seed, "hydra": hydra})
        sweeper.launcher = launcher or plugin.Local()
        sweeper.launcher.config = sweeper.config
        sweeper.sweep(list(arguments))
        return sweeper.study

    def trials(self, study):
        return [(trial.params, trial.state.name, trial.values) for trial in study.trials()]


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", "-m"])
    for name in ("current", "replayed"):
        monkeypatch.setattr(sweep, name, None)
    return Sweeps(tmp_path, monkeypatch)


def test_it_searches(sweeps):
    """Values in their ranges, each trial run once, and better than drawing at random."""
    study = sweeps.start(LR, N_LAYER, "++optim.weight_decay=0,0.1", n_trials=30)
    trials = study.trials()
    assert len(trials) == len(sweeps.runs) == 30 and all(trial.state.name == "COMPLETE" for trial in trials)
    assert all(1e-4 <= run["optim.lr"] <= 1e-2 and run["model.n_layer"] in (1, 2, 3, 4) for run in sweeps.runs)
    assert {run["optim.weight_decay"] for run in sweeps.runs} == {0, 0.1}
    early, late = ([trial.value for trial in part] for part in (trials[:10], trials[-10:]))
    assert sum(late) < sum(early) / 2
    assert [trial.value for trial in trials] == [loss(run) for run in sweeps.runs]


def test_a_killed_study_ends_in_the_same_trials(sweeps):
    """Killed at every moment of the first trial, and of the 13th, which follows from the others."""

    def become(values):
        if values["optim.lr"] > 6e-3:
            return "failed"
        return "pruned" if values["model.n_layer"] == 4 else loss(values)

    sweeps.become = become
    start = functools.partial(sweeps.start, n_trials=14)
    whole = sweeps.trials(start(LR, N_LAYER, name="whole"))
    assert {"COMPLETE", "FAIL", "PRUNED"} == {state for _, state, _ in whole}
    per_trial = (sweeps.moments - 2) // 14
    assert per_trial * 14 + 2 == sweeps.moments
    for kill_at in [*range(1, 4 + per_trial), *range(3 + 12 * per_trial, 3 + 13 * per_trial)]:
        sweeps.kill_at, sweeps.moments, name = kill_at, 0, f"killed-{kill_at}"
        with pytest.raises(Kill):
            start(LR, N_LAYER, name=name)
        sweeps.kill_at = math.inf
        if not (sweeps.folder / name / "sweep.json").exists():  # nothing is left, nothing is lost
            continue
        assert sweeps.trials(start(resume=True, name=name)) == whole, kill_at
        placed = sweep.Sweep.read(sweeps.folder / name).jobs
        assert [job.folder for job in placed] == [str(number) for number in range(14)]


def test_n_trials_is_the_total(sweeps):
    assert len(sweeps.start(LR, n_trials=3).trials()) == 3
    assert len(sweeps.start(resume=True, n_trials=3).trials()) == 3 and len(sweeps.runs) == 3
    study = sweeps.start(resume=True, n_trials=5)
    assert len(study.trials()) == len(sweeps.runs) == 5
    assert sweeps.trials(study) == sweeps.trials(sweeps.start(LR, n_trials=5, name="at once"))
    assert len(sweeps.start(resume=True, n_trials=1).trials()) == 5


def test_how_trials_end(sweeps):
    """Failed, pruned, without a finite goal: told as such, not repeated, and the study continues. So does an invalid trial."""
    ends = ["failed", "pruned", None, 2.0]
    sweeps.become = lambda values: ends[len(sweeps.runs) - 1]
    study = sweeps.start(LR, n_trials=4)
    assert [state for _, state, _ in sweeps.trials(study)] == ["FAIL", "PRUNED", "FAIL", "COMPLETE"]
    assert all(sweep.current.is_done(job) for job in sweep.current.jobs)
    sweeps.start(resume=True, n_trials=4)
    assert len(sweeps.runs) == 4

    sweeps.become = lambda values: 1.0
    study = sweeps.start("++model.n_head=2,3", name="invalid", n_trials=8)  # of model.n_embd=128
    trials = sweeps.trials(study)
    assert {state for values, state, _ in trials if values["model.n_head"] == "3"} == {"FAIL"}
    assert {state for values, state, _ in trials if values["model.n_head"] == "2"} == {"COMPLETE"}
    failed = [job for job in sweep.current.jobs if sweep.current.run_of(job).state() == "failed"]
    assert len(failed) == 1 and failed[0].values == {"model.n_head": "3"}
    assert "divisible by model.n_head=3" in (sweep.current.folder / failed[0].folder / ERROR).read_text()


def test_equal_values_are_one_job(sweeps):
    """Their trials get its result, without a second run, also while it runs."""
    study = sweeps.start("++seed=1,2", n_trials=6)
    assert len(sweeps.runs) == 2 and [state for _, state, _ in sweeps.trials(study)] == ["COMPLETE"] * 6
    assert [job.folder for job in sweep.current.jobs] == ["0", "1"]


class Cluster:
    """A launcher that takes many jobs at once, as submitit does."""

    def __init__(self, sweeps) -> None:
        self.sweeps, self.batches = sweeps, []

    def launch(self, overrides, initial_job_idx) -> None:
        self.batches.append(len(overrides))
        numbers = [given[-1].partition("=")[2] for given in overrides]
        self.sweeps.run_jobs(
            [SimpleNamespace(folder=Path(self.config.hydra.sweep.dir) / number) for number in numbers], 1
        )


def test_another_launcher_gets_batches(sweeps):
    """The trials of a batch are proposed together, and differ."""
    study = sweeps.start(LR, n_trials=7, n_jobs=3, launcher=(cluster := Cluster(sweeps)))
    assert cluster.batches == [3, 3, 1] and [state for _, state, _ in sweeps.trials(study)] == ["COMPLETE"] * 7
    assert len({run["optim.lr"] for run in sweeps.runs}) == 7


def test_two_sweeps_on_one_study(sweeps):
    """They share what they learn and the number of trials; a trial that another machine runs is left to it."""
    shared = {"storage": "postgresql://me:secret@host/db", "study": "lr"}
    sweeps.kill_at = 8
    with pytest.raises(Kill):
        sweeps.start(LR, name="one", n_trials=4, **shared)
    sweeps.kill_at = math.inf
    states = [state for _, state, _ in sweeps.trials(sweeps.start(LR, name="two", n_trials=4, **shared))]
    assert states == ["RUNNING", "COMPLETE", "COMPLETE", "COMPLETE"] and sweep.current.proposals == 0
    study = sweeps.start(name="one", n_trials=4, resume=True, **shared)
    assert [state for _, state, _ in sweeps.trials(study)] == ["COMPLETE"] * 4
    assert len(sweep.Sweep.read(sweeps.folder / "one").jobs) == 1
    (own,) = sweeps.start(LR, name="three", n_trials=1, storage=shared["storage"]).trials()
    assert own.params not in [trial.params for trial in study.trials()]
    with pytest.raises(UserError, match=r"optim\.lr was drawn from another set in trial 0"):
        sweeps.start("++optim.lr=1e-3,1e-2", name="four", **shared)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(1,4)", search.FloatDistribution(1.0, 4.0)),
        ("tag(log,interval(1e-4,1e-2))", search.FloatDistribution(1e-4, 1e-2, log=True)),
        ("int(interval(1,4))", search.IntDistribution(1, 4)),
        ("int(tag(log,interval(1,4)))", search.IntDistribution(1, 4, log=True)),
        ("range(1,5)", search.IntDistribution(1, 4)),
        ("range(8,1,-2)", search.IntDistribution(2, 8, step=2)),
        ("range(0,0.3,0.1)", search.FloatDistribution(0.0, 0.2, step=0.1)),
        ("2,4,2", search.CategoricalDistribution(["2", "4"])),
        ("[default,ema],default", search.CategoricalDistribution(["[default,ema]", "default"])),
        ("1e-3,null", search.CategoricalDistribution(["0.001", "null"])),
    ],
)
def test_spaces(text, expected):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert search.distribution(OverridesParser.create().parse_override(f"x={text}")) == expected


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (["++optim.lr=interval(2,1)"], {}, r"optim\.lr=interval\(2,1\): .*low <= high"),
        (["++optim.lr=tag(log,interval(0,1))"], {}, r"optim\.lr=.*: .*low > 0"),
        (["++model.n_layer=range(4,1)"], {}, r"model\.n_layer=range\(4,1\): no values"),
        (["++seed=1"], {}, "no values to choose from"),
        (["++optim.lrr=interval(1,2)"], {}, r"unknown key optim\.lrr; did you mean optim\.lr"),
        ([LR, "++trainer.max_steps=0"], {}, r"trainer\.max_steps"),
        ([LR], {"n_trials": 0}, "n_trials=0: must be an integer >= 1"),
        ([LR], {"n_trials": "many"}, "n_trials=many: must be"),
        ([LR], {"n_jobs": 0}, r"hydra\.sweeper\.n_jobs=0"),
        ([LR], {"metric": "loss"}, "metric=loss: "),
    ],
)
def test_nothing_starts_from_a_mistake(sweeps, arguments, options, said):
    with pytest.raises(UserError, match=said):
        sweeps.start(*arguments, **options)
    assert not sweeps.runs and not (sweeps.folder / "sweep").exists()


@pytest.mark.parametrize(
    "change", ["++optim.lr=1e-3", "++optim.lr=interval(1,2)", "++trainer.max_steps=40", "++seed=3"]
)
def test_a_resume_keeps_the_study(sweeps, change):
    """Its trials compare, and have been told: they cannot train longer, or be drawn from something else."""
    sweeps.start(LR, n_trials=1)
    with pytest.raises(UserError, match=r"start a new sweep"):
        sweeps.start(change, resume=True)
    assert len(sweeps.start(resume=True, n_trials=2).trials()) == 2


@pytest.mark.parametrize(
    "storage", ["nonsense", "oracle9://u:secret@host/db", "sqlite:////nowhere/at/all.db", "sqlite:///bad.db"]
)
def test_a_storage_that_cannot_be_used(tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    Path("bad.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match=r"hydra\.sweeper\.storage=\S+: ") as error:
        search.Study(tmp_path, storage, None, {}, 1)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_the_file_of_a_study(tmp_path):
    """Values and goals return from it to the bit; a link in its place is not followed."""
    folder = tmp_path / "100% a#b"
    folder.mkdir()
    space = {"lr": search.FloatDistribution(1e-4, 1e-2, log=True), "d": search.CategoricalDistribution(["a", "null"])}
    study = search.Study(folder, None, None, space, 1)
    study.propose()
    study.propose()
    study.tell(study.running()[0], "finished", 0.1 + 0.2)
    (again,) = search.Study(folder, None, None, space, 1).running()
    assert again.params == study.trials()[1].params and study.trials()[0].value == 0.1 + 0.2
    assert (folder / search.FILE).is_file()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / search.FILE).symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(UserError, match="symbolic link"):
        search.Study(tmp_path / "link", None, None, space, 1)


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "gptlab.search")
    monkeypatch.delattr(gptlab, "search")
    with pytest.raises(UserError, match=r"pip install 'gptlab\[optuna\]'"):
        importlib.import_module("gptlab.search")


@pytest.mark.slow
def test_a_study_killed_on_the_real_program(tmp_path, monkeypatch):
    """The parent killed in three of its jobs: trials and metrics are those of a study that was left alone."""
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    chosen = [*TINY, "trainer.max_steps=300", "trainer.val_every=100", "model.n_layer=1", "optim.decay_steps=300",
              "optim.lr=tag(log,interval(1e-4,1e-2))", "n_trials=4"]  # fmt: skip
    command = [sys.executable, "-m", "gptlab.train"]
    new = [*command, "sweep=optuna", *chosen]
    assert subprocess.run([*new, "hydra.sweep.dir=whole"]).returncode == 0
    start = [*new, "hydra.sweep.dir=killed"]
    for job in "013":
        process, log, end = subprocess.Popen(start), Path(f"killed/{job}/metrics.jsonl"), time.monotonic() + 200
        while not (log.exists() and len(log.read_text().splitlines()) > 20):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.kill()
        process.wait()
        start = [*command, "resume=killed"]
    assert subprocess.run(start).returncode == 0
    whole, killed = (sweep.Sweep.read(Path(name)) for name in ("whole", "killed"))
    identities = [[(job.folder, job.id, job.values) for job in one.jobs] for one in (killed, whole)]
    assert identities[0] == identities[1] and len(whole.jobs) == 4
    for job in whole.jobs:
        assert metrics(killed.folder / job.folder) == metrics(whole.folder / job.folder)
        resumed = json.loads((killed.folder / job.folder / "run.json").read_text()).get("resumed", [])
        assert len(resumed) == (job.folder in "013")
