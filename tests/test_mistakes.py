"""Every mistake in a config is one short text that names the key and what was meant, before anything is loaded."""

import difflib
import math
import os
import subprocess
import sys
import time

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from gptlab import cli, config, mistakes
from gptlab import run as runs
from gptlab.config import CONF
from gptlab.data.windows import window_starts

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# What is composed in the walk below: every experiment, and every choice that brings keys of its own.
COMPOSED = [
    [],
    *([f"experiment={name}"] for name in EXPERIMENTS),
    *([f"debug={path.stem}"] for path in sorted((CONF / "debug").glob("*.yaml"))),
    ["data=text"],
    ["callbacks=[early_stopping,ema]"],
    ["logger=wandb"],
]


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """What the entry says to these arguments, in this process: the lines of its error. Nothing may be trained."""
    monkeypatch.chdir(tmp_path)

    def lines(*arguments: str, entry: str = "train") -> list[str]:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        fastest = peer = math.inf
        for _ in range(3):  # another test on this core may take one try its time
            with pytest.raises(SystemExit) as stopped:
                GlobalHydra.instance().clear()
                monkeypatch.setattr(sys, "argv", [entry, *arguments])
                capsys.readouterr()
                started = time.perf_counter()
                cli.main(lambda cfg: config.check(cfg), entry)
            fastest = min(fastest, time.perf_counter() - started)
            if fastest < 0.7:  # and 0.2 for the interpreter
                break
            started = time.perf_counter()
            composed([])
            peer = min(peer, time.perf_counter() - started)
        assert fastest < 0.7 or fastest < 8 * peer, (arguments, fastest, peer)  # a slow machine composes slowly, too
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("\nerror: ") and "Traceback" not in said, said
        return said.strip("\n").split("\n")

    return lines


def composed(overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["hardware=cpu", *overrides])


def leaves(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        child = node._get_node(key)
        inner = isinstance(child, DictConfig) and not child._is_none()
        keys += leaves(child, f"{prefix}{key}.") if inner and len(child) else [f"{prefix}{key}"]
    return keys


def all_keys() -> list[tuple[list[str], str, object]]:
    """(choices, key, value of a wrong type) for every key of everything composed, each (key, class) once."""
    found, seen = [], set()
    for choices in COMPOSED:
        cfg = composed(choices)
        for key in leaves(cfg):
            parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
            identity = (key, parent._metadata.object_type)
            if identity not in seen and not key.startswith("trainer.extra."):  # those are Lightning's to refuse
                seen.add(identity)
                kind = parent._get_node(key.rpartition(".")[2])
                text = "StringNode" in type(kind).__name__ or key.endswith("_target_")
                found.append((choices, key, [1, 2] if text else "a-text"))
    return found


def misspelled(key: str) -> str:
    """Two letters of the last part change places, or it grows by one."""
    head, dot, name = key.rpartition(".")
    swapped = name[:-2] + name[-1] + name[-2] if len(name) > 3 and name[-1] != name[-2] else name + "x"
    return head + dot + swapped


def nested(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.fixture
def experiment(tmp_path):
    """Write an experiment of a user's own; returns what selects it."""

    def write(content: dict, choices: list[str]) -> list[str]:
        folder = tmp_path / "my_conf/experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(content))
        others = [choice for choice in choices if not choice.startswith("experiment=")]
        chosen = [choice.partition("=")[2] for choice in choices if choice.startswith("experiment=")]
        return ["--config-dir", str(tmp_path / "my_conf"), f"experiment=[{','.join([*chosen, 'mine'])}]", *others]

    return write


@pytest.mark.parametrize(
    ("way", "each"),
    [
        ("command line", 1),
        ("command line, added with +", 3),  # every third key: one takes half a second
        ("YAML file", 3),
        pytest.param("command line, added with +", 1, marks=pytest.mark.slow),
        pytest.param("YAML file", 1, marks=pytest.mark.slow),
    ],
)
def test_every_key_misspelled(mistake, experiment, way, each):
    """Walks the composed configs: a key that no schema covers would be accepted, and train with the default instead."""
    keys = all_keys()
    assert len(keys) > 60
    for choices, key, _ in keys[::each]:
        wrong = misspelled(key)
        if way == "YAML file":
            lines = mistake(*experiment(nested(wrong, 1), choices))
            assert "experiment/mine.yaml" in lines[0] or choices[0].startswith("debug=")  # merged after it
        else:
            lines = mistake(*choices, f"{'+' * ('+' in way)}{wrong}=1")
        assert f"there is no key {wrong}" in lines[0], (choices, key, lines)
        meant = lines[0].partition("did you mean ")[2].rstrip("?")
        near = difflib.get_close_matches(key.rpartition(".")[2], [meant.rpartition(".")[2]], cutoff=0.6)
        assert meant == key or near, (choices, key, lines)
        assert len(lines) <= 6


@pytest.mark.parametrize(
    ("way", "each"),
    [
        ("command line", 3),
        ("YAML file", 3),
        pytest.param("command line", 1, marks=pytest.mark.slow),
        pytest.param("YAML file", 1, marks=pytest.mark.slow),
    ],
)
def test_every_key_given_a_wrong_type(mistake, experiment, way, each):
    for choices, key, wrong in all_keys()[::each]:
        if way == "command line" and key in (*cli.TEXT_KEYS, "resume"):
            continue  # taken as text, word for word
        if way == "YAML file" and any(choice.startswith("debug=") for choice in choices):
            continue  # the debug choice's own keys: its values come after an experiment's, and win
        if way == "YAML file":
            lines = mistake(*experiment(nested(key, wrong), choices))
        else:
            text = str(wrong).replace(" ", "")
            lines = mistake(*choices, f"{key}={text}")
        assert key in lines[0] and "it must be " in lines[0], (choices, key, lines)
        assert len(lines) <= 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["max_steps=10"], "there is no key max_steps; did you mean trainer.max_steps?"),
        (["model.block_size=8"], "did you mean data.block_size?"),
        (["modle=gpt2"], "did you mean model?"),
        (["nonsense.deeply=1"], "known here: name, seed, tags"),
        (["model=gtp2"], "model=gtp2: there is no such choice; did you mean gpt2? It may be: "),
        (["callbacks=[default,emma]"], "did you mean ema? It may be: "),
        (["shakespeare_char"], "did you mean data=shakespeare_char or experiment=shakespeare_char?"),
        (["optim=5"], "optim=5: it must be one of adamw"),
        (["logger=[tensorboard,wandb]"], "it must be one of tensorboard, wandb"),
        (["name=../x"], "name=../x: it names the folder of the run"),
        (["trainer.extra.max_steps=3"], "trainer.extra.max_steps: gptlab sets it itself, from trainer.max_steps"),
        (["--resume", "x"], "settings have no dashes: resume=VALUE"),
        (["experiment=mine"], "--config-dir FOLDER, with FOLDER/experiment/mine.yaml"),
        (["resume=my", "run"], "run: settings are given as KEY=VALUE, and values with blanks in quotes"),
        (["data=text", "data.path=${x}.txt"], "data.path=${x}.txt: files with ${ in their names are not taken"),
        (["-m", "hydra.run.dir=x"], "with -m, hydra.sweep.dir=FOLDER"),
        (["name=ä"], "quoted for the shell and for Hydra"),
        (["logger=null"], "'~logger' leaves it out"),
        (["tags=[a"], "tags=[a: cannot be read as KEY=VALUE"),
        (["optim.lr=1,2"], "needs -m"),
        (["-m", "optim.lr=1,much"], "optim.lr=much: it must be a number"),
        (["~optim.lrr"], "~optim.lrr: there is nothing of that name"),
        (["--max_steps=10"], "unknown flag --max_steps; settings have no dashes: max_steps=10"),
        (["--multirum"], "did you mean --multirun?"),
        (["--cfg", "jbo"], "job, hydra or all"),
        (["--config-dir", "nowhere"], "nowhere"),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found"),
        (["optim.betas=[0.9,big]"], "optim.betas[1]=big: it must be a list of 2 values, each a number"),
        (["trainer.max_time=1h"], "DD:HH:MM:SS"),
        (["callbacks.progress=5"], "callbacks.progress=5: it must be a mapping"),
        (["callbacks.progress._target_=no_such_package.Bar"], "no package 'no_such_package'"),
        (["name=\udcff"], "not UTF-8"),
        (["trainer.max_steps=50"], "add optim.warmup_steps=5"),
        (["trainer.accelerator=foo"], "trainer.accelerator=foo: it must be one of cpu, gpu"),
        (["trainer.limit_val_batches=2"], "for Lightning's Trainer: trainer.extra.limit_val_batches=VALUE"),
        (["debug=profile", "trainer.max_steps=10"], "add trainer.max_steps=15"),
        (["data.val_windows=1", "trainer.devices=2"], "data.val_windows=1: it must be at least the number of processes"),
        (["data=text"], "data.path is missing"),
        (["model=gpt-nano", "+model._convert_=all"], "there is no key model._convert_"),
    ],
)  # fmt: skip
def test_common_mistakes(mistake, arguments, said):
    lines = mistake(*arguments)
    assert said in lines[0] and len(lines) <= 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("optim: 5", "optim=5: it must be a mapping"),
        ("callbacks: {sample_text: [1]}", "callbacks.sample_text=[1]: it must be a mapping"),
        ("optim: {lr: 1", "mine.yaml"),
        ("optim:\n\tlr: 1", "mine.yaml"),
        ("seed: 1\nseed: 2", "duplicate key seed"),
        ("defaults: [override /modle: gpt2]", "there is no group modle; did you mean model?"),
        ("defaults: [override /model: gtp2]", "model=gtp2: there is no such choice; did you mean gpt2?"),
        ("model: gpt2", "its defaults list says `override /model: gpt2`"),
        ("defaults: [model: gpt-micro]", "`override /model: gpt-micro`"),
        ("model: {n_layer: null}", "model.n_layer=null: it must be a whole number"),
    ],
)
def test_mistakes_in_a_yaml_file(mistake, tmp_path, content, said):
    (tmp_path / "c/experiment").mkdir(parents=True)
    (tmp_path / "c/experiment/mine.yaml").write_text(f"# @package _global_\n{content}\n")
    lines = mistake("experiment=mine", "--config-dir", "c")
    assert said in "\n".join(lines) and len(lines) <= 6


@pytest.mark.parametrize("content", ["optim: {lr: 1}", ""])
def test_an_experiment_without_its_first_line(mistake, tmp_path, content):
    """Without it, its keys land under `experiment`, which no schema has."""
    (tmp_path / "c/experiment").mkdir(parents=True)
    (tmp_path / "c/experiment/mine.yaml").write_text(content)
    assert "its first line must be `# @package _global_`" in mistake("experiment=mine", "--config-dir", "c")[0]


def test_where_nothing_may_be_written(mistake, tmp_path, monkeypatch):
    def denied(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    assert "go where you may write, or give hydra.run.dir=FOLDER" in mistake("seed=1")[0]


def test_run_folders_are_named_as_they_can_be_typed(tmp_path, monkeypatch):
    """The newest first, none that lacks what makes it one, and quoted; a folder within one is told which."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["new (2)", "older", "broken"]):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "run.json").touch()
        (tmp_path / "outputs" / name / "config.yaml").touch()
        os.utime(tmp_path / "outputs" / name / "config.yaml", (1e9 - age, 1e9 - age))
    (tmp_path / "outputs/broken/config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"newest runs here: 'outputs/new \(2\)', outputs/older$"):
        runs.find_run("outputs/broken")
    with pytest.raises(FileNotFoundError, match="'' names no run folder; the newest"):
        runs.find_run("")
    (tmp_path / "outputs/older/checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lies in one: give outputs/older$"):
        runs.find_run("outputs/older/checkpoints")
    monkeypatch.chdir(tmp_path / "outputs/older")
    with pytest.raises(FileNotFoundError, match="newest runs here: none"):
        runs.find_run("..")
    with pytest.raises(FileNotFoundError, match="typo does not exist; the newest runs here"):
        runs.find_run("typo")


def test_all_mistakes_across_keys_are_reported_at_once(mistake):
    lines = mistake(
        "model.n_head=5", "optim.warmup_steps=3000", "trainer.devices=20", "optim.min_lr=1", "seed=-1", "model.dropout=1"
    )  # fmt: skip
    for key in ("model.n_head", "optim.warmup_steps", "data.batch_size=12", "optim.min_lr", "seed=-1", "model.dropout"):
        assert sum(key in line for line in lines) == 1, key
    assert len(lines) == 6


def test_samples_too(mistake, tmp_path):
    assert "did you mean temperature?" in mistake("tempreature=1", entry="sample")[0]
    assert "there is no key foo" in mistake("+foo=1", entry="sample")[0]
    (tmp_path / "run").mkdir()
    assert "did you mean resume=run (train) or ckpt=run (sample)?" in mistake("run", entry="sample")[0]


def test_a_mistake_costs_less_than_a_second(tmp_path):
    """Heavy imports come after every check of the config. On any machine: a few times what an empty Hydra app takes, the
    fastest of three whole processes each, in turns, as others run too."""
    (tmp_path / "empty.py").write_text("import hydra\nhydra.main(version_base='1.3', config_path=None)(print)()\n")

    def seconds(*command: str) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert "| torch\n" not in done.stderr and "| lightning\n" not in done.stderr, command
        return time.perf_counter() - started

    for times, arguments in (
        (8, ["--help"]),  # Hydra copies all schemas once for each group it lists
        (4, ["model.n_head=5"]),
        (4, ["optim.lrr=1"]),
        (4, ["data=text", "data.path=nowhere.txt"]),
        (4, ["--cfg", "job"]),
    ):
        took = [(seconds("empty.py", "--cfg", "job"), seconds("-m", "gptlab.train", *arguments)) for _ in range(3)]
        empty, ours = map(min, zip(*took, strict=True))
        assert ours < 1 or ours < times * empty, (arguments, took)


def test_a_refused_run_leaves_nothing_behind(gptlab, tmp_path):
    gptlab("train", "model.n_head=5", status=2)
    assert not any((tmp_path / "outputs").iterdir())
    gptlab("train", "model.n_head=5", "hydra.run.dir=mine", status=2)  # a folder that the user named stays
    assert (tmp_path / "mine/.hydra").is_dir()


def test_only_folders_that_gptlab_named_are_removed(gptlab, tmp_path):
    """A folder from a YAML file, or one in which a run was killed at its start, is the user's."""
    (tmp_path / "c/experiment").mkdir(parents=True)
    (tmp_path / "c/experiment/d.yaml").write_text("# @package _global_\nhydra: {run: {dir: mine/here}}\n")
    gptlab("train", "--config-dir", "c", "experiment=d", "model.n_head=5", status=2)
    assert (tmp_path / "mine/here/.hydra").is_dir()
    gptlab("sample", "num_samples=0", cwd=tmp_path / "mine/here", status=2)
    assert (tmp_path / "mine/here/.hydra").is_dir()


def test_a_fault_in_the_program_keeps_its_traceback():
    """A ValueError that gptlab's code did not raise on purpose is no mistake of the user's, even in gptlab's frames."""

    def explained(function) -> str | None:
        try:
            function()
        except Exception as error:
            return mistakes.explain(error, composing=False)

    assert explained(lambda: window_starts(1, -1, 3, 5)) is None  # numpy's, in a frame of ours
    assert explained(lambda: runs.find_run("nowhere")).startswith("nowhere does not exist")
    assert explained(lambda: OmegaConf.create({"a": 1}).b.c) is None
