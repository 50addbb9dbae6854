"""scripts/scaling_laws.py: its fit and intervals on made-up runs whose law is known, its reading of run folders."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import scaling_laws
from scaling_laws import NAMES, Law

CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, equation 10
SMALL = Law(1.0, 30.0, 300.0, 0.35, 0.45)
STUDIES = {  # law, sizes, tokens, noise (standard deviation of log L), its distribution
    "chinchilla": (CHINCHILLA, np.geomspace(5e7, 1e10, 5), np.geomspace(1e9, 5e11, 5), 0.003, "normal"),
    "small and noisy": (SMALL, np.geomspace(4e3, 2.5e5, 4), np.geomspace(1e5, 1.6e6, 5), 0.01, "normal"),
    "heavy tails": (SMALL, np.geomspace(4e3, 2.5e5, 4), np.geomspace(1e5, 1.6e6, 5), 0.003, "t"),
}


def runs(law: Law, sizes: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, d = (axis.ravel() for axis in np.meshgrid(sizes, tokens, indexing="ij"))
    return n, d, law.loss(n, d)


def coverage(study: str, sets: int) -> dict[str, int]:
    """In how many of the noisy data sets each interval holds the true constant, and all five do."""
    law, sizes, tokens, noise, distribution = STUDIES[study]
    n, d, exact = runs(law, sizes, tokens)
    random, held = np.random.default_rng(0), []
    flops = 60 * (n * d).max()
    truth = {**law._asdict(), "N": law.optimal_size(flops)}
    for _ in range(sets):
        draw = random.standard_normal(len(n)) if distribution == "normal" else random.standard_t(4, len(n)) / 2**0.5
        loss = exact * np.exp(noise * draw)
        found = scaling_laws.intervals(n, d, loss, *scaling_laws.fit(n, d, loss), flops)
        held.append({name: low <= truth[name] <= high for name, (low, high) in found.items()})
    counts = {name: sum(row[name] for row in held) for name in truth}
    return counts | {"all five": sum(all(row[name] for name in NAMES) for row in held)}


@pytest.mark.parametrize("law", [CHINCHILLA, SMALL])
def test_exact_runs_give_the_law_back(law):
    """A wrong gradient, or an optimizer that stops early on the long valley of A and alpha, would miss it."""
    n, d, loss = runs(law, np.geomspace(1e5, 1e9, 5), np.geomspace(1e7, 1e11, 5))
    found, _ = scaling_laws.fit(n, d, loss)
    assert found == pytest.approx(law, rel=0.02)


def test_one_bad_run_changes_little():
    """A run that diverged and came back; least squares would move E by more than a tenth."""
    n, d, loss = runs(SMALL, *STUDIES["heavy tails"][1:3])
    loss = loss * np.exp(0.002 * np.random.default_rng(1).standard_normal(len(n)))
    before, _ = scaling_laws.fit(n, d, loss)
    loss[len(loss) // 2] *= 1.3
    after, delta = scaling_laws.fit(n, d, loss)
    assert after == pytest.approx(before, rel=0.1)
    low, high = scaling_laws.intervals(n, d, loss, after, delta, 1e12)["E"]
    assert low < SMALL.E < high


def test_optimal_size_is_the_minimum():
    """Against every size on a fine grid: an exponent or factor mixed up between N and D would move it."""
    sizes = np.geomspace(1e6, 1e13, 100_000)
    best = sizes[CHINCHILLA.loss(sizes, 1e21 / 6 / sizes).argmin()]
    assert CHINCHILLA.optimal_size(1e21) == pytest.approx(best, rel=1e-3)


def test_intervals_hold_the_truth():
    """20 data sets with a fixed seed; of intervals that hold in 95 % of cases, at least 16 do with probability 0.997."""
    counts = coverage("small and noisy", 20)
    assert min(counts.values()) >= 16, counts


def test_intervals_are_no_wider_than_they_need_be():
    """Intervals from 0 to infinity would hold every truth."""
    n, d, loss = runs(*STUDIES["chinchilla"][:3])
    loss = loss * np.exp(0.003 * np.random.default_rng(2).standard_normal(len(n)))
    found = scaling_laws.intervals(n, d, loss, *scaling_laws.fit(n, d, loss), 1e22)
    for name in ("E", "alpha", "beta"):
        low, high = found[name]
        assert high - low < 0.25 * getattr(CHINCHILLA, name), (name, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_intervals_hold_the_truth_in_90_of_100(study):
    """Each constant's, and all five together, as promised."""
    counts = coverage(study, 100)
    print(study, counts)
    assert min(counts.values()) >= 90, counts


def write_run(folder: Path, n_embd: int, steps: int, loss: float | None, changes: dict | None = None) -> None:
    """What gptlab.train leaves, as far as the study reads it; N = 103 * n_embd."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "optim": {"schedule": "cosine", "decay_steps": steps},
        "data": {"batch_size": 16, "block_size": 64},
        "model": {},
    }
    weight = torch.zeros(103, n_embd)
    state = {"model.transformer.wte.weight": weight, "model.lm_head.weight": weight, "model.transformer.wpe.weight": torch.zeros(64, n_embd)}  # fmt: skip
    parts = {"config": {"model": {}, "data": {}}, "tokenizer": {}, "data": {}, "state_dict": state}
    torch.save(parts, folder / "checkpoints/best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text("{}")
    summary = {"steps": steps, "ended": "max_steps", "why": None, "best": {}, "last": {"val/loss": loss}, "data": {"sha256": "x"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | (changes or {})))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Run the script in an empty folder with 3 x 4 runs of a known law."""
    monkeypatch.chdir(tmp_path)
    for i, n_embd in enumerate((40, 400, 4000)):
        for j, steps in enumerate((100, 400, 1600, 6400)):
            law = SMALL.loss(103.0 * n_embd, steps * 1024.0)
            write_run(tmp_path / f"study/{4 * i + j}", n_embd, steps, law * (1 + 0.001 * (-1) ** j))

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["scaling_laws.py", *arguments])
        scaling_laws.main()

    return run


def test_runs_are_read_fitted_and_drawn(study, tmp_path, capsys):
    """Unfinished, diverged and cut runs are named and left out: each would bend the law."""
    (tmp_path / "study/1/summary.json").unlink()
    write_run(tmp_path / "other/diverged", 40, 100, None)
    write_run(tmp_path / "other/cut", 40, 100, 9.0, {"steps": 50})
    write_run(tmp_path / "other/damaged", 40, 100, 9.0)
    (tmp_path / "other/damaged/config.yaml").write_text("optim: 3")
    study("--fit-only", "study", "other", "--flops", "1e13", "--out", "made")
    said = capsys.readouterr().out
    for folder in ("study/1", "other/diverged", "other/cut", "other/damaged"):
        assert f"left out: {folder}: " in said
    assert "from 11 runs" in said
    for name in NAMES:
        value, low, high = map(float, re.search(rf"{name} +(\S+) +\[(\S+), (\S+)\]", said).groups())
        assert low <= getattr(SMALL, name) <= high and low <= value <= high
    assert float(re.search(r"spent: ([\d,]+)", said)[1].replace(",", "")) == pytest.approx(
        SMALL.optimal_size(1e13), rel=0.3
    )
    assert (tmp_path / "made/scaling_laws.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fit-only", "study/0"], "1 finished runs; five constants need at least 8, of 3 sizes and 3 budgets"),
        (["--fit-only", "study", "elsewhere"], "trained on different data"),
        (["--fit-only", "nowhere"], "no folder nowhere"),
        (["--fit-only", "study", "--flops", "-1"], "--flops must be > 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(study, tmp_path, capsys, arguments, said):
    write_run(tmp_path / "elsewhere", 40, 100, 2.0, {"data": {"sha256": "y"}})
    with pytest.raises(SystemExit) as refused:
        study(*arguments)
    assert said in f"{refused.value}{capsys.readouterr().err}"


def test_loss_that_does_not_fall_with_size_is_refused():
    n, d, loss = runs(SMALL, *STUDIES["heavy tails"][1:3])
    with pytest.raises(SystemExit, match="does not fall with both"):
        scaling_laws.intervals(n, d, loss[::-1], SMALL, 0.01, 1e12)


def test_the_sweep_is_started_once_and_then_resumed(study, tmp_path, monkeypatch, capsys):
    """A study that is started again must not train again what it has."""
    commands = []

    def start(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)  # a job failed; the others count

    monkeypatch.setattr(subprocess, "run", start)
    arguments = ("--out", "study", "--sizes", "8,16", "--steps", "5", "data=sort")
    study(*arguments)
    assert {"-m", "model.n_embd=8,16", "trainer.max_steps=5", "data=sort", "hydra.sweep.dir=study"} <= {*commands[0]}
    (tmp_path / "study/sweep.json").write_text("{}")
    study(*arguments)
    assert commands[1][1:] == ["-m", "gptlab.train", "resume=study"]


@pytest.mark.slow
def test_a_tiny_study(tmp_path):
    """The command as a user types it, with real runs."""
    script = Path(scaling_laws.__file__)
    grid = ["--sizes=4,16,64", "--steps=10,40,160", "--out=study", "data.val_windows=50", "hardware=cpu"]
    done = subprocess.run([sys.executable, script, *grid], cwd=tmp_path, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert "from 9 runs" in done.stdout and (tmp_path / "study/scaling_laws.png").exists()
