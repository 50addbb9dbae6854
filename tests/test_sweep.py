"""Which jobs a sweep has, and what a resume does with them. No job runs here; test_jobs.py and test_train.py run some."""

import functools
import json
import re
from pathlib import Path

import pytest
from composed import compose_entry

from gptlab import cli, sweep
from gptlab.errors import UserError
from gptlab.run import ERROR, Run

BASE = ["model=gpt-nano", "++trainer.max_steps=20", "hardware=cpu", "++trainer.linear=torch"]


@functools.cache
def composed(*overrides):
    return cli.load_config(compose_entry("train", *overrides), "train", overrides)


def compose(overrides):
    return composed(*overrides)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A new or resumed sweep in tmp_path/sweep, as the plugin begins it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "current", None)
    monkeypatch.setattr(sweep, "replayed", None)
    monkeypatch.setattr("sys.argv", ["train", "-m"])

    def make(*varied, n_jobs=1, **options):
        overrides = [f"++{key}=1,2" for key in varied] + BASE
        options = {"metric": None, "at": "last", **options}
        return sweep.begin(tmp_path / "sweep", overrides, list(varied), n_jobs=n_jobs, **options)

    return make


def finish(state, job, ended="max_steps", steps=20):
    folder = state.folder / job.folder
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"trainer: {{max_steps: {steps}, max_time: null, threads: 3, devices: 1}}")
    summary = {
        "steps": steps,
        "ended": ended,
        "why": None,
        "best": {"val/loss": 1.0},
        "last": {"val/loss": 2.0, "val/accuracy": 0.5},
    }
    Run(folder).write_summary(summary)


def test_a_job_is_what_it_computes(make):
    """Spelling, order and the machine do not matter; everything else does, and so does the machine where it is swept."""
    state = make("optim.lr")
    same = [
        ["++optim.lr=0.003", "++seed=1", *BASE],
        ["++seed=1", "++optim.lr=3e-3", *BASE],
        ["++optim.lr=0.003", "++seed=1", *BASE, "++data.workers=1", "++trainer.threads=1", "++trainer.max_steps=2e1"],
    ]
    (job,) = {job.folder: job for overrides in same for job in state.place([overrides], compose)}.values()
    assert (job.folder, job.values) == ("0", {"optim.lr": 0.003})
    others = [
        [*BASE, "++optim.lr=0.004"],
        [*BASE, "++optim.lr=0.003", "++seed=2"],
        [*BASE, "++optim.lr=0.003", "model=gpt-micro"],
    ]
    assert [job.folder for job in state.place(others, compose)] == ["1", "2", "3"]
    (state.folder / "sweep.json").unlink()
    assert len(make("trainer.devices").place([[*BASE, f"++trainer.devices={n}"] for n in (1, 2)], compose)) == 2
    (state.folder / "sweep.json").unlink()
    options = make("experiment").place([[*BASE, f"experiment={name}"] for name in ("addition", "sort")], compose)
    assert [job.values for job in options] == [{"experiment": "addition"}, {"experiment": "sort"}]


def test_all_is_written_before_the_first_job_starts(make):
    state = make("seed")
    placed = state.place([[*BASE, f"++seed={seed}"] for seed in (1, 2)], compose)
    read = sweep.Sweep.read(state.folder)
    assert read.jobs == placed and read.varied == ["seed"] and read.overrides == state.overrides
    assert [state.job_overrides(job)[-1] for job in placed] == ["hydra.sweep.subdir=0", "hydra.sweep.subdir=1"]


def test_nothing_is_left_of_a_sweep_that_cannot_run(make):
    state = make("seed")
    with pytest.raises(UserError, match="1 of 2 jobs cannot run"):
        state.place([[*BASE, "++seed=1"], [*BASE, "++seed=x"]], compose)
    assert not state.folder.exists() and sweep.current is None


def test_jobs_of_a_sweep_share_the_number_of_threads(make, monkeypatch):
    """It changes bits: a job that is added with another n_jobs, or on another machine, gets the first one's."""
    monkeypatch.setattr("gptlab.data.files.available_cores", lambda: 8)
    state = make("seed", n_jobs=2)
    (job,) = state.place([[*BASE, "++seed=1"]], compose)
    assert "++trainer.threads=4" in state.job_overrides(job)
    (job,) = state.place([[*BASE, "++seed=2", "++trainer.devices=2"]], compose)
    assert "++trainer.threads=2" in state.job_overrides(job)
    (job,) = state.place([[*BASE, "++seed=3", "++trainer.threads=1"]], compose)
    assert job.threads is None
    sweep.replay(state.folder, [])
    assert make("seed", n_jobs=8).cores_per_job == 4


def test_jobs_of_a_sweep_share_the_linear_layers(make, monkeypatch):
    """They change bits, too: decided once, also for jobs that are added on another machine, and only where it matters."""
    answers = ["onednn"]
    monkeypatch.setattr("gptlab.machine.fastest_linear", lambda: answers.pop())
    state, auto = make("seed"), [*BASE, "++trainer.linear=auto"]
    combinations = [[*auto, "++seed=1"], [*auto, "++seed=2"], [*auto, "++trainer.precision=bf16"], [*BASE, "++seed=3"]]
    jobs = state.place(combinations, compose)
    assert [job.linear for job in jobs] == ["onednn", "onednn", None, None]
    assert "++trainer.linear=onednn" in state.job_overrides(jobs[1])
    sweep.replay(state.folder, [])
    assert make("seed").place([*combinations, [*auto, "++seed=4"]], compose)[-1].linear == "onednn"


def test_a_sweep_of_an_older_gptlab_keeps_its_linear_layers(make, monkeypatch):
    monkeypatch.setattr("gptlab.machine.fastest_linear", lambda: "onednn")
    state, auto = make("seed"), [*BASE, "++trainer.linear=auto"]
    state.place([[*auto, "++seed=1"]], compose)
    content = json.loads((state.folder / "sweep.json").read_text())
    del content["linear"], content["jobs"][0]["linear"]
    (state.folder / "sweep.json").write_text(json.dumps(content))
    sweep.replay(state.folder, [])
    (job,) = make("seed").place([[*auto, "++seed=1"]], compose)
    assert job.linear == "torch"


def test_threads_of_jobs_that_ran_alone(make):
    """They took torch's own number, which another machine would answer otherwise."""
    state = make("seed")
    (job,) = state.place([[*BASE, "++seed=1"]], compose)
    assert job.threads is None
    finish(state, job)  # with 3 threads
    sweep.replay(state.folder, ["++seed=2"])
    state = make("seed")
    assert state.place([[*BASE, "++seed=1"], [*BASE, "++seed=2"]], compose)[1].threads == 3


@pytest.mark.parametrize("content", ["[", "trainer: 5", "trainer: {threads: auto, devices: 1}"])
def test_a_damaged_job_does_not_stop_the_others(make, content):
    """It is resumed, and fails with what is wrong."""
    state = make("seed")
    combinations = [[*BASE, f"++seed={seed}"] for seed in (1, 2)]
    first, second = state.place(combinations, compose)
    finish(state, first)
    finish(state, second)
    (state.folder / "0/config.yaml").write_text(content)
    sweep.replay(state.folder, ["++trainer.max_steps=30"])
    state = make("seed")
    assert state.cores_per_job == 3
    assert [state.is_done(job) for job in state.place(combinations, compose)] == [False, False]


def test_results_that_cannot_be_written_end_no_job(make):
    state = make("seed")
    state.place([[*BASE, "++seed=1"]], compose)
    (state.folder / "results.md").mkdir()
    sweep._update_results({"0"})
    with pytest.raises(OSError):
        sweep.conclude()


def test_threads_of_jobs_that_had_not_started(make):
    """Another machine, or another OMP_NUM_THREADS, must not answer for them either."""
    state = make("seed")
    jobs = state.place([[*BASE, "++seed=1"], [*BASE, "++seed=2"]], compose)
    finish(state, jobs[0])  # with 3 threads
    sweep.replay(state.folder, [])
    state = make("seed")
    job = state.place([[*BASE, "++seed=1"], [*BASE, "++seed=2"]], compose)[1]
    assert "++trainer.threads=3" in state.job_overrides(job)


def test_states(make):
    state = make("seed")
    placed = state.place([[*BASE, f"++seed={seed}"] for seed in range(5)], compose)
    for job, name in zip(placed, ("config.yaml", ERROR), strict=False):
        (state.folder / job.folder).mkdir()
        (state.folder / job.folder / name).write_text("x")
    finish(state, placed[2])
    finish(state, placed[3], ended="pruned")
    states = ["interrupted", "failed", "finished", "pruned", "waiting"]
    assert [state.run_of(job).state() for job in placed] == states
    assert [state.is_done(job) for job in placed] == [False, False, True, True, False]


def test_a_resume_composes_only_what_is_left(make):
    """A finished sweep of a hundred jobs is done in a second."""
    state = make("seed")
    combinations = [[*BASE, f"++seed={seed}"] for seed in (1, 2)]
    first, second = state.place(combinations, compose)
    finish(state, first)
    sweep.replay(state.folder, [])
    composed = []
    placed = make("seed").place(combinations, lambda overrides: composed.append(overrides) or compose(overrides))
    assert [job.id for job in placed] == [first.id, second.id] and composed == [combinations[1]]


def test_what_a_resume_can_change(make):
    """Values of swept keys are added, keys of the machine and the end of training are set for all jobs; nothing else."""
    state = make("seed", "optim.lr")
    state.place([[*BASE, "++seed=1", "++optim.lr=1"]], compose)
    line = sweep.replay(
        state.folder, ["++seed=2,3", "++trainer.max_steps=40", "hydra.launcher.n_jobs=2", "++data.workers=1"]
    )
    assert line[0] == "-m" and "++seed=1,2,3" in line and "hydra.launcher.n_jobs=2" in line
    assert line[-1] == f"hydra.sweep.dir='{state.folder}'"
    state = make("seed", "optim.lr")
    (job,) = state.place([[*BASE, "++seed=1", "++optim.lr=1"]], compose)
    changes = ["++trainer.max_steps=40", "++data.workers=1"]
    assert state.changes == changes and set(changes) <= set(state.job_overrides(job))
    sweep.replay(state.folder, ["++trainer.max_steps=50", "hardware=gpu"])
    assert sweep.replayed.changes == ["++trainer.max_steps=50", "++data.workers=1", "++trainer.accelerator=gpu"]
    for refused in ("++optim.weight_decay=1", "model=gpt-micro", "++name=x"):
        with pytest.raises(
            UserError,
            match=rf"cannot change {sweep.key_of(refused)}\b[^\n]*\nIt can get more values of seed, optim\.lr",
        ):
            sweep.replay(state.folder, [refused])


def test_longer_training_resumes_finished_jobs(make):
    """And only those that have not reached it: the resume may have been killed on its way."""
    state = make("seed")
    short, long, stopped = state.place([[*BASE, f"++seed={seed}"] for seed in (1, 2, 3)], compose)
    finish(state, short)
    finish(state, long, steps=40)
    finish(state, stopped, ended="early_stopping")
    sweep.replay(state.folder, ["++trainer.max_steps=4e1"])
    state = make("seed")
    assert [state.is_done(job) for job in (short, long, stopped)] == [False, True, True]
    sweep.replay(state.folder, ["++trainer.max_steps=30"])
    with pytest.raises(UserError, match=r"trainer\.max_steps=30: job 1 has already reached step 40"):
        make("seed").place([job.overrides for job in (short, long, stopped)], compose)


@pytest.mark.parametrize(
    ("key", "given", "saved"),
    [("max_steps", "1e3", "1000"), ("max_steps", "many", "many"), ("max_time", "90m", "00:01:30:00"), ("max_time", "null", "null")],
)  # fmt: skip
def test_a_new_limit_is_compared_with_config_yaml(make, key, given, saved):
    make("seed").write()
    sweep.replay(Path("sweep"), [f"++trainer.{key}={given}"])
    assert sweep.replayed.changes == [f"++trainer.{key}={saved}"]


def test_conf_has_changed(make):
    """What has not started would be another experiment than what has; what has started keeps its config."""
    state = make("seed")
    combination = [*BASE, "++seed=1"]
    (job,) = state.place([combination], compose)
    sweep.replay(state.folder, [])
    with pytest.raises(UserError, match=r"job 0 of .* composes to another config"):
        make("seed").place([combination], lambda overrides: compose([*overrides, "++optim.lr=1"]))
    finish(state, job)
    (state.folder / "0/summary.json").unlink()
    assert make("seed").place([combination], lambda overrides: compose([*overrides, "++optim.lr=1"]))[0].folder == "0"


def test_two_at_once(make, tmp_path):
    """A second start on the same folder is refused, and a resume of a sweep that runs, too."""
    state = make("seed")
    state.place([[*BASE, "++seed=1"]], compose)
    with pytest.raises(UserError, match="already holds a sweep; continue it with resume=sweep"):
        make("seed")
    second = state.model_copy()  # which began before the first had written anything
    sweep.current = None
    with pytest.raises(UserError, match="already holds a sweep"):
        second.write()


@pytest.mark.parametrize(
    "override",
    ["hydra.launcher._target_=hydra_plugins.x.Y", "hydra/launcher=../../x", "hydra/callbacks=x", "+hydra.callbacks.x._target_=y",
     "hydra.sweeper.storage=sqlite:////etc/x", "hydra.searchpath=[file:///tmp]", "model=../../tmp/evil", "experiment=/tmp/evil",
     "experiment=[a,/tmp/evil]", "model@hydra.callbacks=x", "++trust=true", "++resume=elsewhere", "~hydra.callbacks.gatekeeper",
     "--config-dir=evil"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["overrides", "changes", "jobs"])
def test_an_untrusted_sweep(make, override, place):
    """sweep.json may come from elsewhere: what reaches beyond gptlab's own conf/ takes trust=true."""
    state = make("seed")
    state.jobs.append(sweep.Job(folder="0", id="", values={}, overrides=[*BASE], threads=None))
    state.write()
    content = json.loads((state.folder / "sweep.json").read_text())
    (content["jobs"][0]["overrides"] if place == "jobs" else content[place]).append(override)
    (state.folder / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="runs code or downloads; add trust=true"):
        sweep.replay(state.folder, [])
    if place != "changes":  # of which even trust allows no others than a command line
        assert sweep.replay(state.folder, ["++trust=true"]) and sweep.replayed.trust


@pytest.mark.parametrize("override", ["++model._target_=os.system", "++data.url=http://127.0.0.1/x"])
def test_untrusted_code_in_a_job(make, override):
    state = make("seed")
    combination = [*BASE, "++seed=1", "data=shakespeare_char", override]
    state.place([combination], compose)  # new: the user has typed it
    for given, trusted in ((["++trust=true"], True), ([], False)):
        sweep.replay(state.folder, given)
        if trusted:
            assert "++trust=true" in make("seed").job_overrides(make("seed").place([combination], compose)[0])
            continue
        with pytest.raises(UserError, match="add trust=true"):
            make("seed").place([combination], compose)


def test_what_was_checked_is_what_starts(make):
    """A job of an untrusted sweep.json can have the id of one config and the overrides of another."""
    state = make("seed")
    combination = [*BASE, "++seed=1"]
    (job,) = state.place([combination], compose)
    job.overrides = [*combination, "++callbacks.x._target_=os.system"]
    state.write()
    sweep.replay(state.folder, [])
    (job,) = make("seed").place([combination], compose)
    assert (job.folder, job.overrides) == ("0", combination)


@pytest.mark.parametrize("link", [".lock", "0"])
def test_links_of_an_untrusted_sweep(make, tmp_path, link):
    """Writing through .lock would empty the file that it names."""
    state = make("seed")
    state.place([[*BASE, "++seed=1"]], compose)
    (tmp_path / "mine").write_text("mine")
    (state.folder / link).unlink(missing_ok=True)
    (state.folder / link).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a symbolic link"):
        sweep.replay(state.folder, [])
    assert (tmp_path / "mine").read_text() == "mine"


def test_your_own_options_need_trust(make):
    """The command that a sweep prints says so."""
    state = make("seed")
    assert state.resume_command() == "python -m gptlab.train resume=sweep"
    assert state.model_copy(update={"flags": ["--config-dir", "my_conf"]}).resume_command().endswith(" trust=true")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "{}", '{"jobs": [{"folder": "../../x"}]}', '{"jobs": 5}', "\xff"],
)
def test_a_damaged_sweep(make, tmp_path, content):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text(content, "latin-1")
    with pytest.raises(UserError, match=r"cannot read .*sweep\.json; restore it"):
        sweep.replay(tmp_path / "sweep", [])


def test_folders_of_jobs_lie_inside(make):
    state = make("seed")
    state.place([[*BASE, "++seed=1"]], compose)
    content = json.loads((state.folder / "sweep.json").read_text())
    for folder in ("../x", "/x", "", "0/../..", "1\n", "a"):
        content["jobs"][0]["folder"] = folder
        (state.folder / "sweep.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"cannot read .*sweep\.json"):
            sweep.Sweep.read(state.folder)


@pytest.mark.parametrize(("options", "said"), [({"metric": "loss"}, "metric=loss: "), ({"at": "first"}, "at=first: ")])
def test_metric_and_at(make, options, said):
    with pytest.raises(UserError, match=said):
        make("seed", **options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("++seedd=4", "cannot change seedd; did you mean seed?"),
        ("++trainer.max_steps=60,80", "the sweep does not vary trainer.max_steps; give one value"),
    ],
)
def test_mistakes_in_a_resume(make, given, said):
    state = make("seed")
    state.write()
    with pytest.raises(UserError, match=re.escape(said)):
        sweep.replay(state.folder, [given])


def test_a_metric_that_the_data_do_not_have(make):
    """Refused before the first job; or all would train, and none be ranked."""
    with pytest.raises(UserError, match="metric=val/accuracy requires data=addition"):
        make("seed", metric="val/accuracy").place([[*BASE, "++seed=1"]], compose)
    state = make("seed", metric="val/accuracy")
    assert state.place([[*BASE, "++seed=1", "data=addition"]], compose)


def test_the_goal_of_a_search(make):
    for options, goal in (
        ({}, -0.5),  # problems have an accuracy
        ({"metric": "val/loss"}, 2.0),
        ({"at": "best"}, 1.0),
    ):
        state = make("seed", **options)
        (job,) = state.place([[*BASE, "++seed=1"]], compose)
        finish(state, job)
        assert state.goal(job) == goal
        (state.folder / "sweep.json").unlink()


def test_the_command_of_a_job(make, monkeypatch):
    """New, it is what a user would type; with a run in its folder, its resume, with what the sweep's resumes have changed."""
    state = make("seed")
    (job,) = state.place([[*BASE, "++seed=1"]], compose)
    state.changes = ["++trainer.max_steps=40"]
    state.write()
    folder, overrides = state.folder / "0", [*state.job_overrides(job), "++trust=true"]
    command = sweep.process("train", overrides, folder).command
    assert command[-2:] == ["hydra.mode=RUN", f"hydra.run.dir='{folder}'"] and "hydra.sweep.subdir=0" not in command
    assert command[command.index("-m") :][1] == "gptlab.train" and set([*BASE, "++seed=1"]) < set(command)
    folder.mkdir()
    (folder / "config.yaml").touch()
    started = sweep.process("train", overrides, folder)
    assert started.command[-3:] == [f"resume={folder}", "++trainer.max_steps=40", "++trust=true"]
    assert started.label == "job 0 (seed=1)"


def test_a_job_of_a_preset_is_a_run():
    """Its command names the preset, which may set more than values to sweep; it must not become a sweep itself."""
    chosen = ["sweep=seeds", "data=python_docs", "hardware=cpu"]
    assert cli.prepare_overrides(chosen, "train")[0] == "-m"
    line = cli.prepare_overrides([*chosen, "hydra.mode=RUN", "hydra.run.dir=x/0"], "train")
    assert "-m" not in line and "sweep=seeds" in line


def test_jobs_get_the_interpreter_with_its_flags(make, monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "_args_from_interpreter_flags", lambda: ["-O", "-X", "utf8"])
    command = sweep.process("sample", ["++seed=1"], Path("x/0")).command
    assert command[1:5] == ["-O", "-X", "utf8", "-m"]


def test_latest_is_the_whole_sweep(make, tmp_path):
    state = make("seed")
    state.place([[*BASE, "++seed=1"]], compose)
    job = tmp_path / "sweeps/a/0"
    job.mkdir(parents=True)
    for name in ("run.json", "config.yaml"):
        (job / name).touch()
    assert sweep.find(["resume=latest"]) is None
    (tmp_path / "sweeps/a/sweep.json").touch()
    assert sweep.find(["resume=latest"]) == Path("sweeps/a") and sweep.find(["resume=sweep"]) == Path("sweep")
    assert sweep.find(["seed=1"]) is None and sweep.find(["resume=sweeps/a/0"]) is None
