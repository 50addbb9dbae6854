"""python -m gptlab.compare: which runs it finds, which keys it calls varied, and what it says to bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from fake_runs import write_run, write_sweep

from gptlab.compare import compare
from gptlab.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A sweep over the learning rate, two single runs, and a run whose config is damaged."""
    monkeypatch.chdir(tmp_path)
    jobs = [{"optim.lr": lr, "seed": seed} for lr in (0.001, 0.003) for seed in (1, 2)]
    write_sweep(tmp_path / "sweeps/lr/now", jobs, [2.0, 2.2, 1.9, 2.0])
    write_run(tmp_path / "outputs/wide/a", {"model.n_embd": 96, "seed": 1, "name": "wide", "tags": ["big", "x"]}, 1.5)
    write_run(tmp_path / "outputs/wide/b", {"model.n_embd": 96, "seed": 2, "name": "wide"}, 1.7)
    write_run(tmp_path / "outputs/bad/c", {}, 1.0)
    (tmp_path / "outputs/bad/c/config.yaml").write_text("a: &x [1]\nb: *x\n")
    return tmp_path


def test_runs_and_sweeps_stand_in_one_table(folder, capsys):
    """Keys that differ are columns, seeds are one configuration, a damaged run is listed, a folder named twice counts once,
    and nothing is written."""
    before = sorted(folder.rglob("*"))
    compare(["outputs", "sweeps", "outputs/wide", "sweeps/lr/now/2"])
    text = capsys.readouterr().out
    assert "7 runs, 1 damaged, 6 finished" in text
    header, *_ = (line.split() for line in text.split("\n") if line.startswith("|"))
    assert [word for word in header if "." in word] == ["model.n_embd", "optim.lr"]
    lines = [line for line in text.split("\n") if line.startswith("| ") and " finished" in line]
    assert [line.split(" | ")[2].strip() for line in lines] == ["1.6000", "1.9500", "2.1000"]
    assert "outputs/wide/{a,b}" in lines[0] and "sweeps/lr/now/{2,3}" in lines[1]
    assert "outputs/bad/c" in text.partition("Not ranked:")[2]
    assert sorted(folder.rglob("*")) == before


def test_the_machine_is_no_configuration(folder, capsys):
    """Two runs with the same seed on other hardware, with other names and places of the data, are the same configuration."""
    machine = {"trainer.devices": 2, "data.workers": 3, "data.path": "/else", "tags": ["t"], "name": "n", "logger": None,
               "trainer.log_every": 7, "callbacks.sample_text.top_k": 5}  # fmt: skip
    write_run(folder / "m/1", {"seed": 1}, 2.0)
    write_run(folder / "m/2", {"seed": 2, **machine}, 2.1)
    compare(["m"])
    assert "One configuration" in capsys.readouterr().out


def test_filters(folder, capsys):
    """By name, tag, and the value of a key however it is written; several values, several filters."""
    for arguments, found in (
        (["name=wide"], 2),
        (["tag=big"], 1),
        (["optim.lr=3e-3"], 2),
        (["optim.lr=0.001,0.003"], 6),
        (["model.bias=false", "model.dropout=0"], 6),
        (["optim.lr=0.003", "seed=2"], 1),
        (["data.path=null"], 6),
    ):
        compare(["outputs", "sweeps", *arguments])
        assert f": {found} runs, " in capsys.readouterr().out, arguments


def test_out_writes_the_three_files(folder, capsys):
    compare(["sweeps", "out=both", "at=best", "metric=val/bits_per_byte"])
    text = capsys.readouterr().out
    assert sorted(os.listdir("both")) == ["results.csv", "results.md", "results.png"]
    assert (folder / "both/results.md").read_text() in text and "val/bits_per_byte at the best validation" in text


@pytest.mark.parametrize(
    ("arguments", "key", "fix"),
    [
        ([], "no folder", "gptlab.compare FOLDER"),
        (["nothing"], "nothing", "no such folder"),
        (["empty"], "empty", "no runs or sweeps"),
        (["sweeps", "lr=0.001"], "lr", "did you mean optim.lr"),
        (["sweeps", "optim.lr=5"], "optim.lr=5", "0.001, 0.003"),
        (["sweeps", "metric=loss"], "metric=loss", "val/loss"),
        (["sweeps", "at=first"], "at=first", "last or best"),
        (["sweeps", "out=sweeps/lr/now"], "out=sweeps/lr/now", "name another"),
        (["sweeps", "out=mine"], "out=mine", "name another"),
        (["sweeps", "out=file"], "out=file", "name another"),
        (["sweeps", "out=file/x"], "out=file/x", "name another"),
    ],
)
def test_bad_input(folder, arguments, key, fix):
    (folder / "empty").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine/results.csv").write_text("a user's own\n")
    (folder / "file").write_text("")
    with pytest.raises(UserError) as error:
        compare(arguments)
    assert key in str(error.value) and fix in str(error.value)
    assert (folder / "mine/results.csv").read_text() == "a user's own\n"


def test_a_damaged_sweep_json_is_a_warning(folder, capsys):
    """Its runs are still found, each by itself."""
    (folder / "sweeps/lr/now/sweep.json").write_text("{")
    compare(["sweeps"])
    captured = capsys.readouterr()
    assert "warning: " in captured.err and "4 runs, 4 finished" in captured.out


DAMAGE = [b"", b"\xff\xfe", b"null", b"3", b"[]", b"{}", b"{", b"[" * 1100, b"a: 0x" + b"f" * 9000, b"optim: {lr: 0x" + b"f" * 9000 + b"}",
          b'{"data": 3, "last": [], "best": 0, "steps": {}, "ended": [], "why": 0}', b"[1]\n{}\n[1]\n{\"step\": \"x\"}\n"]  # fmt: skip


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "summary.json", "metrics.jsonl", "error.txt"])
def test_a_damaged_file_of_a_run_ends_nothing(folder, capsys, name):
    """Run folders come from anyone: whatever is in a file, the run is listed, and the other runs are compared."""
    for i, content in enumerate(DAMAGE):
        write_run(folder / f"d/{i}", {}, 2.0, ended=None if name == "error.txt" else "max_steps")
        (folder / f"d/{i}/{name}").write_bytes(content)
    compare(
        ["d", "sweeps", "metric=val/loss", *(["out=both"] if name == "metrics.jsonl" else [])]
    )  # the picture's file
    text = capsys.readouterr().out
    assert f": {len(DAMAGE) + 4} runs, " in text and "sweeps/lr/now/{2,3}" in text


def test_the_command(tmp_path):
    """Status 2 and one line for a user's mistake; the help; no torch, which would take seconds."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-X", "importtime", "-m", "gptlab.compare", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("nowhere")
    assert done.returncode == 2 and "\nerror: nowhere: no such folder" in done.stderr
    done = run("--help")
    assert done.returncode == 0 and "optim.lr=0.001,0.003" in done.stdout
    assert not {"torch", "scipy", "matplotlib"} & set(done.stderr.replace("|", " ").split())


@pytest.mark.slow
def test_trained_runs_compare(gptlab, tmp_path):
    """Real run folders: a sweep of four jobs and two single runs."""
    gptlab("train", "-m", *TINY, "optim.lr=0.001,0.003", "seed=1,2", "hydra.sweep.dir=sweep")
    for seed in (1, 2):
        gptlab("train", *TINY, "model.n_layer=1", f"seed={seed}", f"hydra.run.dir=outputs/{seed}")
    said = gptlab("compare", "sweep", "outputs", "out=both").stdout
    assert "6 runs, 6 finished" in said and "Best: " in said and said.count("2 finished") == 3
    assert (tmp_path / "both/results.png").stat().st_size > 10_000
