"""The run folder: who may write there, how it is found, and what is logged into it."""

import csv
import errno
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gptlab import loggers
from gptlab import run as run_module
from gptlab.errors import MissingFileError, UserError
from gptlab.loggers import CSVTable
from gptlab.run import Metrics, Run, find_checkpoint
from gptlab.targets import foreign_targets, require_trust

CONFIG = {
    "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32"},
    "tags": ["a"],
    "texts": ["${seed}", "é\n"],
}


def record(run: Run, resumed_at: int | None = None, **config) -> dict:
    run.write_description(CONFIG | config, data={"name": "d"}, tokenizer={}, device="cpu", resumed_at=resumed_at)
    return json.loads((run.folder / "run.json").read_text())


@pytest.fixture
def outputs(tmp_path, monkeypatch) -> list[Run]:
    """Two runs, the newer first, in the working directory."""
    monkeypatch.chdir(tmp_path)
    runs = [Run(Path("outputs/new (2)")), Run(Path("sweeps/a/0"))]
    for age, run in enumerate(runs):
        record(run)
        os.utime(run.folder / "run.json", (1e9 - age, 1e9 - age))
    return runs


def test_what_is_imported():
    """A config is checked in less time than torch takes, and sampling starts without Lightning's 2.5 s."""
    program = (
        "import sys; import gptlab.resume, gptlab.report, gptlab.targets; assert not {'torch', 'hydra'} & set(sys.modules);"
        "import gptlab.checkpoint, gptlab.sample, gptlab.model; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_finding_runs(outputs):
    """Named as they can be typed."""
    new, old = outputs
    assert Run.find("latest").folder == new.folder and Run.find("sweeps/a/0").folder == old.folder
    for name in ("outputs", "typo", "", "~nobody-of-that-name", "a\0b", "x" * 300):
        with pytest.raises(MissingFileError, match=r"not a run folder.*runs here: 'outputs/new \(2\)', sweeps/a/0$"):
            Run.find(name)
    os.chdir(old.folder)
    with pytest.raises(MissingFileError, match=r"latest: no runs under"):
        Run.find("latest")


def test_finding_checkpoints(outputs):
    """The best one, else the newest; a milestone by its file."""
    new, _ = outputs
    with pytest.raises(MissingFileError, match=r"'outputs/new .2.' has no checkpoint"):
        find_checkpoint("latest")
    folder = new.folder / "checkpoints"
    folder.mkdir()
    for name in ("step_00001000", "previous", "last", "best"):
        (folder / f"{name}.ckpt").touch()
        assert find_checkpoint(str(folder / f"{name}.ckpt")).stem == name
        if name in ("last", "best"):
            assert find_checkpoint("latest").stem == name
    assert [path.stem for path in new.checkpoints()] == ["last", "previous", "best"]


def test_of_two_processes_one_gets_the_folder(tmp_path):
    run = Run(tmp_path / "run")
    program = (
        f"from gptlab.run import Run; Run({str(run.folder)!r}).claim(resuming=True); print('mine', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=rf"locked by process {other.pid} on "):
        run.claim(resuming=False)
    other.kill()
    other.wait()
    run.claim(resuming=False)


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
    """A run folder from elsewhere could point its lock or log at any file."""
    (tmp_path / "precious").write_text("key")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="symbolic link"):
        Run(tmp_path / "run").claim(resuming=True)
    assert (tmp_path / "precious").read_text() == "key"


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "a: &x {y: *x}", "[1]", "a: [", "!!python/object/apply:os.system [ls]"]
)
def test_a_malicious_config_is_one_error(tmp_path, text):
    """Aliases could nest a config a billionfold, or in itself."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot read"):
        Run(tmp_path).read_config()
    (tmp_path / "summary.json").write_text("{}")
    assert Run(tmp_path).read_summary() is None


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_files_of_a_user_are_not_overwritten(tmp_path, name):
    """Such as the config.yaml of another program, in a project's folder. Nothing is left there."""
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"already holds a run .{name}.; continue it with resume="):
        Run(tmp_path).claim(resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    Run(tmp_path).claim(resuming=True)


@pytest.mark.parametrize(("resuming", "fix"), [(False, "set hydra.run.dir="), (True, "resume a copy")])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, resuming, fix):
    """Said before anything else is done. (Tests may run as root, who may write anywhere.)"""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"cannot write to \S*run \(.*{fix}"):
        Run(tmp_path / "run").claim(resuming=resuming)


def test_a_refused_run_leaves_nothing_of_its_own(tmp_path):
    for name, kept in (("new", False), ("old", True)):
        run = Run(tmp_path / name / "run")
        if kept:
            run.folder.mkdir(parents=True)
        run.claim(resuming=False)
        (run.folder / "train.log").touch()
        run.discard()
        assert (tmp_path / name).exists() == kept


def test_the_record_of_a_run_and_its_resumes(tmp_path):
    """run.json is for people: lost or damaged, it is rewritten. Texts come back as they are."""
    run = Run(tmp_path)
    about = record(run)
    assert about["machine"] == CONFIG["trainer"] and about["data"] == {"name": "d"} and "resumed" not in about
    run.write_summary({"status": "finished"})
    assert [entry["step"] for entry in record(run, resumed_at=3, seed=2, trust=True)["resumed"]] == [3]
    assert run.read_summary() is None and run.read_config() == {**CONFIG, "seed": 2}
    assert [entry["step"] for entry in record(run, resumed_at=5)["resumed"]] == [3, 5]
    for damage in (lambda path: path.unlink(), lambda path: path.write_text('{"command": [')):
        damage(tmp_path / "run.json")
        assert [entry["step"] for entry in record(run, resumed_at=7)["resumed"]] == [7]


@pytest.mark.parametrize("content", ["a: [1", "null", "\0", "[" * 2000, "2001-99-99", b"\xff"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"cannot read \S+config.yaml; restore it"):
        Run(tmp_path).read_config()


def metrics_with(tmp_path: Path, lines: list[dict]) -> Path:
    metrics = Metrics(tmp_path / "metrics.jsonl", {"name": "d"})
    for line in lines:
        metrics.append({name: value for name, value in line.items() if name != "step"}, line["step"])
    metrics.sync()
    return metrics.path


LINES = [{"step": 0, "val/loss": 4.0}, {"step": 2, "train/loss": math.nan}, {"step": 2, "val/loss": 3.0}, {"step": 4, "train/loss": 2.0}]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "due", "kept"), [(0, False, 0), (2, False, 3), (2, True, 2), (3, True, 3), (4, False, 4)]
)
def test_a_resume_drops_what_it_will_log_again(tmp_path, start, due, kept):
    """And nothing else, nor before it logs something: it may yet be refused."""
    path = metrics_with(tmp_path, LINES)
    with open(path, "a") as file:
        file.write('{"step": 5, "train/lo')  # a kill
    content, expected = path.read_text(), [{**line, "train/loss": None} if line.get("train/loss") != line.get("train/loss") else line for line in LINES]  # fmt: skip
    metrics = Metrics(path, {"name": "d"}, start, validation_due=due)
    assert metrics.kept == expected[:kept] and path.read_text() == content
    metrics.append({"train/loss": 9.0}, 9)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "data": {"name": "d"}}, *expected[:kept], {"step": 9, "train/loss": 9.0}]


def test_damaged_metrics(tmp_path):
    """They are what the run has to show: never thrown away unasked."""
    path = metrics_with(tmp_path, LINES)
    path.write_bytes(path.read_bytes().replace(b"}\n", b"\n", 1).replace(b'"val', b"val", 1))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged .*; repair it, or move it away"):
        Metrics(path, {"name": "d"}, 2)
    path.unlink()
    assert Metrics(path, {"name": "d"}, 2).kept == []


def test_csv_table(tmp_path):
    """A row per step, from metrics.jsonl, whatever is at its end."""
    table = CSVTable(str(tmp_path))
    table.save()
    assert not (tmp_path / "metrics.csv").exists()
    path = metrics_with(tmp_path, LINES)
    with open(path, "a") as file:
        file.write('{"step": 5, "train/lo')
    table.finalize("failed")
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == [("0", "4.0", ""), ("2", "3.0", ""), ("4", "", "2.0")]
    assert list(rows[0]) == ["step", "val/loss", "train/loss"]


def test_weights_and_biases_without_a_key(tmp_path, monkeypatch):
    """A logger that fails as wandb.init does; the text is its own, and what to do."""

    class Error(Exception):
        pass

    class Wandb(loggers.WandbLogger):
        def __init__(self, save_dir):
            pass

        @property
        def experiment(self):
            raise Error("No API key configured.\nmore")

    monkeypatch.setitem(sys.modules, "wandb.errors", types.SimpleNamespace(Error=Error))
    monkeypatch.setattr(loggers, "build", lambda key, target, arguments: Wandb(**arguments))
    with pytest.raises(UserError, match=r"logger=wandb: No API key configured\.; .*add logger.offline=true"):
        loggers.make_loggers({"_target_": "Wandb"}, Run(tmp_path), {}, {}, resuming=False)


def test_foreign_targets():
    """Only full names are known, at any depth; and a file that nests a list a billionfold costs nothing."""
    laughs: list = ["ha"]
    for _ in range(64):
        laughs = [laughs, laughs]
    loop: dict = {}
    loop["again"] = [loop, {"_target_": "b.C"}]
    config = {"_target_": "ours.A", "x": [{"y": {"_target_": "ours.A.os.system"}}], "z": laughs, "loop": loop, "t": ({"_target_": ["ours.A"]},)}  # fmt: skip
    expected = ["a _target_ that is not a name", "b.C", "ours.A.os.system"]
    assert foreign_targets(config, {"ours.A"}) == expected
    require_trust("run", expected, trust=True)
    assert foreign_targets({"_target_": "ours.A", "_target": "b.C"}, {"ours.A"}) == []
    with pytest.raises(UserError, match=r"run needs .*b.C, .*trust=true"):
        require_trust("run", expected, trust=False)
