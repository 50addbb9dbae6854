"""From the command line to a validated config: what is arranged for Hydra, what is refused and how, what it costs."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from composed import compose_entry, composed, leaf_keys
from conftest import TINY
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gptlab import cli, config
from gptlab.errors import UserError

NO_NETWORK = "data.url=http://127.0.0.1:9/none"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The lines of the error for these arguments, in this process. Nothing runs, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "notes", [])

    def lines(*arguments: str, entry: str = "train") -> list[str]:
        GlobalHydra.instance().clear()
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # cli.main sets it; put back after the test
        monkeypatch.setattr(sys, "argv", [entry, *arguments])
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(lambda cfg: pytest.fail("it ran"), entry)
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and printed.err.startswith("\nerror: "), printed
        assert "Traceback" not in printed.err and sorted(tmp_path.rglob("*")) == before
        return printed.err.removeprefix("\nerror: ").rstrip("\n").split("\n")

    return lines


def arranged(*arguments: str, entry: str = "train") -> list[str]:
    return cli.prepare_overrides([*arguments, *(["hardware=cpu"] if entry == "train" else [])], entry)


# Quoting and order.


@pytest.mark.parametrize(
    "text",
    ["hello", "a, b", "First Citizen:", "a=b", "it's", 'say "hi" now', "tail\\", "\\'", "\\\\'x", "{a: [1]}", "${seed}", "\\${x}",
     "$x", "1.5", "true", "  spaces ", "line\nbreak\ttab", "#%&|;<>()", "", "'a' and 'b'", '"quoted"', "'", "a\\\n", "é🙂", "C:\\temp\\new"],
)  # fmt: skip
def test_free_text_reaches_the_config_word_for_word(text):
    (argument,) = arranged(f"prompt={text}", entry="sample")
    override = OverridesParser.create().parse_override(argument)
    assert OmegaConf.create({"prompt": override.value(), "seed": 7}).prompt == text
    assert arranged(argument, entry="sample") == [argument]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["seed=1", "+optim.lr=2", "++name=x"], ["++seed=1", "++optim.lr=2", "++name=x"]),
        (["data.path=my (1), text.txt"], ["++data.path='my (1), text.txt'"]),
        (["data.path=null"], ["++data.path=null"]),
        (["model=gpt2", "~logger", "~optim.lr", "hydra.verbose=true", "hydra/launcher=x"],) * 2,  # Hydra's own
        (["a=1", "-m", "data.path=a,b", "--config-dir", "c", "--cfg", "job"],
         ["-m", "--config-dir", "c", "--cfg", "job", "++a=1", "++data.path=a,b"]),
    ],
)  # fmt: skip
def test_arranged(given, expected):
    """Flags first, and `++` before every key; again the same, as Lightning's child processes and jobs get it again."""
    assert arranged(*given) == [*expected, "hardware=cpu"]
    assert cli.prepare_overrides(arranged(*given), "train") == arranged(*given)


def test_hardware_is_asked_once_and_only_if_not_given(monkeypatch):
    monkeypatch.setattr(cli, "detect_hardware", lambda: "gpu")
    assert cli.prepare_overrides(["seed=1"], "train") == ["++seed=1", "hardware=gpu"]
    assert cli.prepare_overrides(["hardware=cpu"], "train") == ["hardware=cpu"]
    assert cli.prepare_overrides(["ckpt=x"], "sample") == ["++ckpt='x'"]


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun's first process of the second machine
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's second process in an interactive job
        ({"NODE_RANK": "1"}, False),  # set by hand, where Lightning starts the processes of each machine
    ],
)
def test_the_first_process_of_a_run(monkeypatch, environment, first):
    """The only one that takes the lock and writes: a second one would fail on it."""
    for rank in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(rank, raising=False)
    for rank, value in environment.items():
        monkeypatch.setenv(rank, value)
    assert cli.is_first_process() is first
    assert ("hydra.output_subdir=null" in arranged()) is not first


# What is refused, and how.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["max_steps=10"], "unknown key max_steps; did you mean trainer.max_steps?"),
        (["+model.n_layers=3"], "unknown key model.n_layers; did you mean model.n_layer?"),
        (["model=gtp2"], "model=gtp2: unknown option; did you mean gpt2? All: gopher-44m, gpt, "),
        (["experiment=shakespeare"], "did you mean shakespeare_bpe or shakespeare_char or shakespeare_char_speedrun? All: "),
        (["experiment=mine"], "experiment=mine: unknown option; known: addition, "),
        (["callbacks=[default,emma]"], "callbacks=emma: unknown option; did you mean ema?"),
        (["shakespeare_char"], "settings are KEY=VALUE; did you mean data=shakespeare_char or experiment=shakespeare_char?"),
        (["optim=5"], "Config group override must be a string or a list. Got int"),
        (["name='../x'"], "name=../x: must be the name of a folder inside outputs/"),
        (["--max_iters=5"], "--max_iters=5; settings have no dashes: KEY=VALUE"),
        (["--resume", "x"], "settings have no dashes"),
        (["--multirum"], "unrecognized arguments: --multirum"),
        (["--cfg", "jbo"], "invalid choice: 'jbo' (choose from 'job', 'hydra', 'all')"),
        (["--config-dir", "nowhere"], "nowhere' not found"),
        (["data=text"], "data.path is missing"),
        (["data=text", "data.path=${x}.txt"], "data.path=${x}.txt: No such file"),
        (["name=ä"], "name=ä: cannot be parsed; quote special characters for the shell and for Hydra: \"name='ä'\""),
        (["tags=[a"], "tags=[a: cannot be parsed"),
        (["logger=null"], "logger=null: choose an option; to leave logger out: '~logger'"),
        (["callbacks=null"], "'~callbacks'"),
        (["optim.lr=1,2"], "optim.lr=1,2: several values are a sweep; add -m"),
        (["~optim.lrr"], "Could not delete from config. 'optim.lrr' does not exist."),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
        (["~model"], "model is missing"),
        (["trainer.max_time=1 h"], "trainer.max_time=1 h: must be a duration such as 90m"),
        (["data.workers=1000"], "data.workers=1000 must be <= "),
        (["resume=latest"], "latest: no runs under"),
        (["resume=nowhere"], "nowhere is not a run folder (no config.yaml)"),
        (["-m", "hydra.run.dir=x"], "with -m use hydra.sweep.dir=FOLDER"),
        (["-m", "seed=1,2", "hydra.sweep.subdir=x"], "jobs are numbered"),
        (["n_jobs=2"], "n_jobs=2: only a sweep has n_jobs; add -m"),
        (["-m", "seed=1,2", "n_jobs=0"], "n_jobs=0: must be an integer >= 1"),
        (["-m", "seed=1,2", "n_trials=3"], "n_trials for sweep=optuna"),
        (["-m", "seed=1,2", "metric=loss"], "metric=loss: must be "),
        (["-m", "optim.lr=interval(0,1)"], "optim.lr=interval(0,1): a grid takes single values; add sweep=optuna"),
        (["sweep=seeds", "seed=1,x"], "1 of 2 jobs cannot run, so none was started"),
        (["sweep=seedz"], "sweep=seedz: unknown option; did you mean seeds?"),
        (["hydra.nope=1"], "hydra.nope"),
    ],
)  # fmt: skip
def test_refused(refused, arguments, said):
    lines = refused(*arguments)
    assert said in lines[0] and len(lines) <= 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tempreature=1"], "unknown key tempreature; did you mean temperature?"),
        (["+foo=1"], "unknown key foo; known: ckpt, "),
        (["num_samples=0"], "num_samples=0: must be >= 1"),
        (["run"], "run: settings are KEY=VALUE; did you mean resume=run (train) or ckpt=run (sample, evaluate)?"),
        (["-m", "num_samples=1,0"], "1 of 2 jobs cannot run, so none was started"),
    ],
)
def test_sampling_refuses_too(refused, tmp_path, arguments, said):
    (tmp_path / "run").mkdir()
    assert said in refused(*arguments, entry="sample")[0]


def test_preparing_refuses_too(refused):
    assert refused("tokenizer=bpe", "pth=x", entry="prepare") == [
        "unknown key pth; did you mean path?", "tokenizer=bpe needs vocab_size, such as vocab_size=8192"
    ]  # fmt: skip
    assert "one folder is written at a time" in refused("-m", "out=a,b", entry="prepare")[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: 5", "optim=5: must be a mapping"),
        ("optim: {lrr: 1}\nseed: x", "unknown key optim.lrr; did you mean optim.lr?"),
        ("callbacks: {sample_text: [1]}", "experiment/mine"),
        ("optim: {lr: 1", "mine.yaml"),
        ("optim:\n\tlr: 1", "mine.yaml"),
        ("seed: 1\nseed: 2", "found duplicate key seed"),
        ("defaults: [override /modle: gpt2]", "In 'experiment/mine': Could not override 'modle'"),
        ("defaults: [override /model: gtp2]", "model=gtp2: unknown option; did you mean gpt2?"),
        ("defaults: [model: gpt-micro]", "experiment/model=gpt-micro: no such group; the defaults list of experiment says `override /model: gpt-micro`"),
        ("model: gpt2", "its defaults list says `override /model: gpt2`"),
        ("model: {n_layer: null}", "model.n_layer=null: must be an integer"),
        ("hydra: {nope: 1}", "experiment/mine"),
    ],
)  # fmt: skip
def test_refused_in_a_yaml_file(refused, tmp_path, content, said):
    (tmp_path / "c/experiment").mkdir(parents=True)
    (tmp_path / "c/experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    lines = refused("experiment=mine", "--config-dir", "c")
    assert said in "\n".join(lines) and len(lines) <= 6


@pytest.mark.parametrize("content", ["optim: {lr: 1}", ""])
def test_an_experiment_without_its_first_line(refused, tmp_path, content):
    """Without it, its keys land under `experiment`."""
    (tmp_path / "c/experiment").mkdir(parents=True)
    (tmp_path / "c/experiment/mine.yaml").write_text(content)
    assert (
        "the first line of its YAML must be `# @package _global_`" in refused("experiment=mine", "--config-dir", "c")[0]
    )


def test_a_whole_command_line_is_reported_at_once(refused):
    lines = refused("optim.lrr=1", "model.n_head=5", "seed=-1", "+foo=1", "trainer.max_time=x")
    starts = ("unknown key optim.lrr", "model.n_embd=128", "seed=-1", "unknown key foo", "trainer.max_time=x")
    assert len(lines) == 5 and all(any(line.startswith(start) for line in lines) for start in starts)


def test_a_sweep_is_checked_as_a_whole(refused, tmp_path):
    """Before its first job starts: all that are wrong, jobs with the same fault together."""
    lines = refused("-m", "seed=1,x", "model.n_head=4,5")
    assert lines == [
        "3 of 4 jobs cannot run, so none was started",
        "job 1 (seed=1, model.n_head=5):", "model.n_embd=128 must be divisible by model.n_head=5",
        "job 2 (seed=x, model.n_head=4):", "seed=x: must be an integer",
        "job 3 (seed=x, model.n_head=5):", "seed=x: must be an integer", "model.n_embd=128 must be divisible by model.n_head=5",
    ]  # fmt: skip
    assert refused("-m", "seed=1,2", "optim.lrr=1") == ["unknown key optim.lrr; did you mean optim.lr?"]
    assert "did you mean gpt2?" in "\n".join(refused("-m", "model=gpt2,gtp2"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert "cannot be combined with a sweep" in refused("-m", "resume=run", "seed=1,2")[0]
    assert "leave out hydra.run.dir" in refused("resume=run", "hydra.run.dir=x")[0]


def test_a_foreign_package_of_the_same_name(refused, tmp_path):
    """The jobs of a sweep would import it from the working directory."""
    (tmp_path / "gptlab").mkdir()
    (tmp_path / "gptlab/__init__.py").touch()
    assert "another package named gptlab, which the jobs would import" in refused("-m", "seed=1,2")[0]


def test_where_nothing_may_be_written(refused, monkeypatch):
    def denied(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    assert "Permission denied); set hydra.run.dir=FOLDER" in refused("seed=1")[0]


def test_a_fault_in_the_program_keeps_its_traceback():
    """Only a UserError is a user's mistake, once the config is composed; one inside another error is one too."""
    with pytest.raises(UserError) as wrapped:
        try:
            raise KeyError("x")
        except KeyError as error:
            raise UserError("seed=x") from error
    for error, text in ((ValueError("a"), None), (KeyError("a"), None), (wrapped.value, "seed=x")):
        assert cli.error_text(error) == text
    assert cli.error_text(ValueError("a"), composing=True).startswith("a\n")


@pytest.mark.slow
def test_full_error_shows_the_traceback(gptlab):
    assert "Traceback" in gptlab("train", *TINY, "model.n_head=5", status=1, HYDRA_FULL_ERROR="1").stderr


# Text that is not there.


def test_missing_data_are_replaced_once_and_said(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    monkeypatch.setattr(cli, "notes", [])
    chosen = arranged("experiment=shakespeare_char", NO_NETWORK)
    assert chosen[-2:] == ["data=python_docs", "++name=python_docs"]
    assert any("WARNING" in note and "training on python_docs" in note for note in cli.notes)
    assert arranged("experiment=shakespeare_char", NO_NETWORK, "name=mine")[-1] == "data=python_docs"
    assert arranged("-m", "seed=1,2", "data=shakespeare_char", NO_NETWORK)[-2:] == chosen[-2:]  # for all jobs
    for kept in (["data.fallback=null"], ["data.path=mine.txt"]):
        assert arranged("data=shakespeare_char", NO_NETWORK, *kept)[-1] == "hardware=cpu", kept
    assert arranged("data=python_docs")[-1] == "hardware=cpu"


def test_text_at_hand_is_not_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path))
    (tmp_path / "shakespeare_char.txt").write_bytes(b"to be")
    checksum = f"data.sha256={hashlib.sha256(b'to be').hexdigest()}"
    assert arranged("data=shakespeare_char", NO_NETWORK, checksum)[-1] == "hardware=cpu"


# Speed, streams, signals, threads: new processes.


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_pure_files_import_neither_lightning_nor_hydra():
    loaded = modules_after(
        "import gptlab.model, gptlab.attention, gptlab.generate, gptlab.optim, gptlab.pretrained, gptlab.linear, gptlab.sources"
    )
    assert "torch" in loaded
    assert not loaded & {"lightning", "hydra", "omegaconf", "pytorch_lightning"}


def test_the_entries_import_nothing_heavy():
    loaded = modules_after(
        "import gptlab.train, gptlab.sample, gptlab.evaluate, gptlab.cli, gptlab.config, gptlab.inherit"
    )
    assert not loaded & {"torch", "lightning", "tiktoken"}


def test_a_config_error_takes_less_than_a_second(tmp_path):
    """Heavy imports come after every check of the config. On any machine: a few times the CPU time of an empty Hydra app,
    the fastest of up to five whole processes each, alternating."""
    (tmp_path / "empty.py").write_text("import hydra\nhydra.main(version_base='1.3', config_path=None)(print)()\n")

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert "| torch\n" not in done.stderr and "| lightning\n" not in done.stderr, command
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for times, arguments in (
        (6, ["model.n_head=5"]),
        (7, ["data=text", "data.path=nowhere.txt"]),
        (7, ["--help"]),
        (8, ["-m", "seed=1,2,3", "model.n_head=5"]),
    ):
        took = []
        for _ in range(5):  # the machine's speed changes from one process to the next
            took.append((seconds("empty.py", "--cfg", "job"), seconds("-m", "gptlab.train", *arguments)))
            empty, ours = map(min, zip(*took, strict=True))
            if ours < 1 or ours < times * empty:
                break
        else:
            pytest.fail(f"{arguments}: {took}")


def test_help_explains_every_key(gptlab):
    for entry in ("train", "sample", "sizing"):
        shown = gptlab(entry, "--help").stdout
        for key in leaf_keys(composed(entry)[0]):
            name = key.rpartition(".")[2]
            explained = re.search(rf"^ *{name}:.*  # \w", shown, re.MULTILINE)
            assert explained or name == "_target_", key
    assert "${" not in shown.partition("KEY=VALUE, as")[0] and "$$" not in shown


def test_flags_may_stand_anywhere(gptlab):
    assert "n_layer: 2" in gptlab("train", "model.n_layer=2", "--cfg", "job", "seed=3").stdout


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """Without the variables that conftest sets for tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=cwd, env=kept | environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-"])
def test_a_closed_stream_is_no_obstacle(tmp_path, closed):
    """Daemons and cron start things so. Hydra's logging and the progress bar would write into a None."""
    command = f"{sys.executable} -m gptlab.train {' '.join(TINY)} hydra.run.dir=run {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
    assert "Traceback" not in done.stderr + (tmp_path / "run/train.log").read_text()


def test_arguments_are_utf8_whatever_the_locale_says(tmp_path):
    code = "import sys; from gptlab import cli; cli.prepare_process(); print(ascii(sys.argv[1]))"
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}):
        assert (
            python("-c", code, "prompt=é🙂", cwd=tmp_path, **locale).communicate()[0] == "'prompt=\\xe9\\U0001f642'\n"
        )


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(tmp_path, given, spins):
    """Two runs on the same cores starve each other with libgomp's default."""
    code = "import os, sys; from gptlab import cli; cli.prepare_process(); print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert python("-c", code, cwd=tmp_path, **given).communicate()[0] == f"{spins} False\n"


@pytest.mark.parametrize("tries", [3, pytest.param(70, marks=pytest.mark.slow)])
def test_ctrl_c_in_the_first_seconds(tmp_path, tries):
    """At random moments after the handler is set (the start of the interpreter is Python's): at once 130, nothing printed
    but a word, and nothing left that hinders the next run. Imports swallow a KeyboardInterrupt, so one is lost without
    the handler."""
    rng = random.Random(1)
    for attempt in range(tries):
        process = python(
            "-X",
            "importtime",
            "-m",
            "gptlab.train",
            *TINY,
            "trainer.max_steps=100000",
            "hydra.run.dir=run",
            cwd=tmp_path,
        )
        imported = next(line for line in process.stderr if re.search(r"\| gptlab$", line))
        time.sleep(delay := rng.uniform(0, 6))
        os.killpg(process.pid, signal.SIGINT)
        sent = time.perf_counter()
        out, err = process.communicate(timeout=60)
        printed = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("import time:"))
        assert process.returncode == 130, (attempt, delay, process.returncode, imported, out, printed)
        assert "Traceback" not in printed and time.perf_counter() - sent < 20, (delay, printed)
        saved = (tmp_path / "run/config.yaml").exists()
        arguments = ["resume=run", "trainer.max_steps=1"] if saved else [*TINY, "hydra.run.dir=run"]
        if attempt % 3 == 2 and not (tmp_path / "run/checkpoints/last.ckpt").exists():
            follow = python("-m", "gptlab.train", *arguments, cwd=tmp_path)
            follow.communicate(timeout=120)
            assert follow.returncode == 0, delay
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


# A run folder from elsewhere.


@pytest.fixture(scope="module")
def run_config() -> dict:
    values, _ = composed("train", "hardware=cpu", "model=gpt-nano", "~logger")
    return values


EVIL = {"_target_": "distutils.spawn.spawn", "cmd": ["touch", "pwned"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"hydra": {"callbacks": {"evil": EVIL}}},
        {"hydra": {"launcher": EVIL, "sweeper": EVIL, "job_logging": {"handlers": {"x": {"()": "os.system"}}}}},
        {"callbacks.evil": EVIL},
        {"callbacks.sample_text.prompt": EVIL},
        {"model.nested": [{"deeper": [EVIL]}]},
        {"trainer.extra": {"callbacks": [EVIL]}},
        {"model._target_": "gptlab.model.os.system"},
        {"data._target_": "gptlab.cli.main"},
        {"defaults": [{"override hydra/launcher": "evil"}]},
        {"model._target_": ["gptlab.model.GPT"]},
    ],
)
def test_a_run_folder_from_elsewhere_runs_no_code(refused, tmp_path, run_config, changes):
    """Whatever its config.yaml names: neither Hydra nor gptlab builds it, nested or not, unless the user trusts it."""
    values = run_config
    for key, value in changes.items():
        values = config.with_value(values, key, value)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(values))
    text = "\n".join(refused("resume=run"))
    if "_target_" in str(changes) and "hydra" not in changes:
        assert "trust=true" in text or "a _target_ that is not a name" in text, text
    if "distutils" in str(changes) and "hydra" not in changes:
        assert "distutils.spawn.spawn" in text


@pytest.mark.parametrize(
    "text", ["plain", "${seed}", "a ${oc.env:HOME} b", "\\${x}", "\\\\${x} \\", "$x {y}", "$", "${"]
)
def test_a_run_folder_gives_back_every_text(tmp_path, monkeypatch, text):
    """A prompt with ${...} in it must not be interpolated, neither from the command line nor from a saved config."""
    monkeypatch.chdir(tmp_path)
    at = "callbacks.sample_text.prompt"
    (given, *_) = arranged(f"{at}={text}")
    new = cli.load_config(compose_entry("train", given), "train", [given]).model_dump()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(new))
    again = cli.load_config(compose_entry("train", "++resume=run"), "train", ["++resume=run"]).model_dump()
    assert config.select(new, at) == config.select(again, at) == text


@pytest.mark.slow
def test_a_trusted_run_builds_its_classes(gptlab, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import lightning as L\nclass Said(L.Callback):\n    def on_train_start(self, *_): print('my callback')\n"
    )
    done = gptlab("train", *TINY, "callbacks.mine={_target_: mine.Said}", "hydra.run.dir=run")
    assert "my callback" in done.stdout and "trust=true" in done.stdout  # the advice can be followed as it is
    done = gptlab("train", "resume=run", "trainer.max_steps=6", status=2)
    assert "mine.Said" in done.stderr and "trust=true" in done.stderr and "my callback" not in done.stdout
    assert "my callback" in gptlab("train", "resume=run", "trainer.max_steps=6", "trust=true").stdout
