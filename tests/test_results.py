"""Tables, verdicts and pictures of sweeps, from run folders that are written here: nothing is trained."""

import csv
import itertools
import math
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fake_runs import write_run, write_sweep

from gptlab import results
from gptlab.sweep import Sweep


def combinations(**values) -> list[dict]:
    """Jobs of a grid; `optim__lr` is optim.lr."""
    keys = [key.replace("__", ".") for key in values]
    return [dict(zip(keys, some, strict=True)) for some in itertools.product(*values.values())]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def cells(text: str, *starts: str) -> list[str]:
    """The cells of the one table row that begins with these."""
    table = [[cell.strip() for cell in line.split(" | ")] for line in text.split("\n") if line.startswith("| ")]
    (row,) = (row for row in table if [cell.lstrip("| ") for cell in row[: len(starts)]] == list(starts))
    return [cell.strip("| ") for cell in row]


def png_size(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def verdict(*scores: list[float | None]) -> str:
    """Of configurations with these losses for seeds 0, 1, 2 ... (None: that seed is missing)."""
    ranked = [
        results.Configuration({"optim.lr": i}, [], {str(s): x for s, x in enumerate(some) if x is not None})
        for i, some in enumerate(scores)
    ]
    return "\n".join(results.verdict(sorted(ranked, key=lambda one: one.mean)))


def test_seeds_are_aggregated(tmp_path):
    """By hand: losses 2.0, 2.1, 2.2 have mean 2.1 and standard deviation 0.1; with 2 degrees of freedom t is 4.3027, so
    the interval reaches 4.3027 * 0.1 / sqrt(3) = 0.2484 to each side. A spread with n instead of n - 1 would be 0.0816."""
    jobs = combinations(optim__lr=[0.001, 0.01], seed=[1, 2, 3])
    write_sweep(tmp_path / "sweep", jobs, [2.5, 2.6, 2.7, 2.2, 2.0, 2.1])
    text = results.update(Sweep.read(tmp_path / "sweep"), picture=False)
    expected = ["0.01", "2.1000", "0.1000", "1.8516 to 2.3484", "3", "31,000", "62 s", "3 finished", "{3,4,5}"]
    assert cells(text, "0.01") == expected
    assert text.index("| 0.01 ") < text.index("| 0.001 ")  # the best first, not the first first
    assert text == (tmp_path / "sweep/results.md").read_text()


def test_the_csv_has_a_row_for_every_job(tmp_path):
    """Full keys as columns, full precision, and a row for jobs that failed or never started."""
    jobs = combinations(optim__lr=[0.001, 0.1], seed=[1, 2])
    write_sweep(tmp_path / "sweep", jobs, [2.123456789, 2.2, None, None])
    write_run(tmp_path / "sweep/2", jobs[2], ended=None, error="non-finite loss at step 7\nmore")
    results.update(Sweep.read(tmp_path / "sweep"), picture=False)
    table = rows(tmp_path / "sweep")
    assert list(table[0])[:7] == ["folder", "status", "optim.lr", "seed", "val/loss", "val/bits_per_byte", "steps"]
    assert [row["folder"] for row in table] == ["0", "1", "2", "3"]
    assert [row["status"] for row in table] == ["finished", "finished", "failed", "waiting"]
    assert [row["val/loss"] for row in table] == ["2.123456789", "2.2", "", ""]
    assert [row["optim.lr"] for row in table] == ["0.001", "0.001", "0.1", "0.1"]
    assert table[2]["error"] == "non-finite loss at step 7"
    assert {row["tokens_per_s"] for row in table[:2]} == {"31000.4"}


def test_every_state_of_a_job(tmp_path):
    """Only finished runs with a finite metric are ranked, early-stopped ones among them; all others are listed."""
    losses = {"finished": 2.0, "early": 2.1}
    jobs = [{"optim.lr": float(i + 1)} for i in range(9)]
    write_sweep(tmp_path / "s", jobs, [None] * 9)
    write_run(tmp_path / "s/0", jobs[0], losses["finished"])
    write_run(tmp_path / "s/1", jobs[1], losses["early"], ended="early_stopping")
    write_run(tmp_path / "s/2", jobs[2], 1.0, ended="pruned")
    write_run(tmp_path / "s/3", jobs[3], 1.0, ended=None, error="killed")
    write_run(tmp_path / "s/4", jobs[4], 1.0, ended=None)
    write_run(tmp_path / "s/5", jobs[5], 1.0, ended=None)
    write_run(tmp_path / "s/6", jobs[6], None)  # the loss of the last validation was not finite
    write_run(tmp_path / "s/7", jobs[7], 1.0)
    (tmp_path / "s/7/config.yaml").write_text("a: [")
    text = results.update(Sweep.read(tmp_path / "s"), running={"5"}, picture=False)
    states = ["finished", "finished", "pruned", "failed", "interrupted", "running", "finished", "damaged", "waiting"]
    assert [row["status"] for row in rows(tmp_path / "s")] == states
    ranked, _, rest = text.partition("Not ranked:")
    assert "| 1.0000" not in ranked and cells(ranked, "1")[1] == "2.0000" and cells(ranked, "2")[1] == "2.1000"
    assert [cells(rest, str(i + 1))[2] for i in range(2, 9)] == states[2:]
    (tmp_path / "s/6/summary.json").write_text("{")
    assert (
        "summary.json" in results.update(Sweep.read(tmp_path / "s"), picture=False)
        and rows(tmp_path / "s")[6]["status"] == "damaged"
    )


def test_failed_seeds_are_said(tmp_path):
    """The mean of the others flatters: that they lead beyond the noise is not said."""
    jobs = combinations(optim__lr=[1.0, 2.0], seed=[1, 2, 3])
    write_sweep(tmp_path / "s", jobs, [2.0, 2.01, 2.02, 1.0, 1.01, None])
    write_run(tmp_path / "s/5", jobs[5], ended=None, error="diverged")
    text = results.update(Sweep.read(tmp_path / "s"), picture=False)
    assert "Best: optim.lr=2, but 1 of its 3 runs failed" in text and "beyond the noise" not in text


def test_a_metric_that_no_run_has(tmp_path):
    write_sweep(tmp_path / "s", combinations(seed=[1, 2]), [2.0, 2.1], metric="val/accuracy")
    text = results.update(Sweep.read(tmp_path / "s"), picture=False)
    assert "No finished run has the metric compared; measured: val/loss, val/bits_per_byte" in text


def test_a_configuration_with_a_pruned_seed_is_not_ranked(tmp_path):
    """Its other seeds are the lucky ones: here they would win."""
    jobs = combinations(optim__lr=[1.0, 2.0], seed=[1, 2])
    write_sweep(tmp_path / "s", jobs, [1.0, None, 2.0, 2.0])
    write_run(tmp_path / "s/1", jobs[1], 9.0, ended="pruned")
    ranked, _, rest = results.update(Sweep.read(tmp_path / "s"), picture=False).partition("Not ranked:")
    assert "| 1.0000" not in ranked and "| 2.0000" in ranked
    assert "| finished | 0 " in rest and "| pruned   | 1 " in rest


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ({"trainer.max_steps": 200}, {"trainer.max_steps": 400}, "stopping rule"),
        ({"trainer.max_time": None}, {"trainer.max_time": "00:01:00:00"}, "stopping rule"),
        ({"data.val_windows": 10}, {"data.val_windows": 20}, "validation"),
        ({"data.val_windows": 10, "data.block_size": 32}, {"data.val_windows": 10}, "validation"),
        ({"sha256": "a"}, {"sha256": "b"}, "data"),
    ],
)
def test_runs_that_do_not_compare_stand_in_separate_tables(tmp_path, a, b, why):
    """One table would call the run that trained longer, or was measured on easier text, the better configuration."""
    jobs = [{**changes, "seed": seed} for changes in (a, b) for seed in (1, 2)]
    write_sweep(tmp_path / "s", jobs, [None] * 4)
    for i, job in enumerate(jobs):
        changes = {key: value for key, value in job.items() if key != "sha256"}
        write_run(tmp_path / f"s/{i}", changes, 2.0 + i, sha256=job.get("sha256", "d"))
    text = results.update(Sweep.read(tmp_path / "s"), picture=False)
    assert f"2 tables, because runs with another {why} do not compare" in text
    assert text.count("val/loss at the last validation") == 2
    assert text.count("One configuration: nothing to compare") == 2


def test_a_block_size_does_not_separate_runs_that_are_validated_on_everything(tmp_path):
    """Without data.val_windows each token is predicted once, whatever the block size."""
    jobs = combinations(data__block_size=[32, 64])
    write_sweep(tmp_path / "s", jobs, [2.0, 2.1])
    assert "tables" not in results.update(Sweep.read(tmp_path / "s"), picture=False)


def test_the_metric_that_is_compared(tmp_path):
    """Losses per token of different tokenizers do not compare, and problems are about right answers; a metric and a
    validation that are asked for win."""
    jobs = combinations(optim__lr=[0.1, 0.2])
    for name, arguments, losses, expected in (
        ("loss", {}, (2.0, 2.1), "val/loss at the last validation, lower"),
        ("bits", {"vocabulary": True}, (2.0, 2.1), "val/bits_per_byte at the last validation, lower"),
        ("accuracy", {"accuracy": (0.5, 0.75)}, (2.0, 2.1), "val/accuracy at the last validation, higher"),
        (
            "asked",
            {"sweep": {"metric": "val/loss", "at": "best"}, "best": (1.9, 1.8)},
            (2.0, 2.1),
            "val/loss at the best",
        ),
    ):
        write_sweep(tmp_path / name, jobs, [None, None], **arguments.get("sweep", {}))
        for i, (job, loss) in enumerate(zip(jobs, losses, strict=True)):
            metrics = {"val/accuracy": arguments["accuracy"][i]} if "accuracy" in arguments else {}
            vocabulary = f"{i}" if "vocabulary" in arguments else "v"
            best = arguments["best"][i] if "best" in arguments else None
            write_run(tmp_path / name / str(i), job, loss, vocabulary=vocabulary, metrics=metrics, best=best)
        text = results.update(Sweep.read(tmp_path / name), picture=False)
        assert expected in text
        best = "0.2" if name in ("accuracy", "asked") else "0.1"
        assert f"Best: optim.lr={best}." in text


def test_the_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3). For 2 degrees of freedom the two-sided p is
    1 - t / sqrt(t^2 + 2) = 0.07418. An unpaired test of these losses would give 0.64."""
    t = 2 * math.sqrt(3)
    p = results.p_value({"1": 2.0, "2": 9.0, "3": 5.0}, {"3": 2.0, "1": 1.0, "2": 7.0, "4": 0.0})
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2)) == pytest.approx(0.07418, abs=1e-5)


def test_the_paired_test_is_scipys():
    from scipy.stats import ttest_rel

    draw = random.Random(1)
    for n in (2, 3, 5, 10):
        a, b = ([draw.gauss(0, 1) for _ in range(n)] for _ in range(2))
        p = results.p_value(dict(zip("abcdefghij", a, strict=False)), dict(zip("abcdefghij", b, strict=False)))
        assert p == pytest.approx(ttest_rel(a, b).pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (([1.0],), "One configuration"),
        (([1.0], [2.0]), "needs >= 2 common seeds"),
        (([1.0, 1.1, None], [None, 1.5, 1.6]), "needs >= 2 common seeds"),
        (([1.0, 1.1], [1.0, 1.1]), "differences that vary"),  # the same losses
        (([0.97, 0.98], [0.98, 0.99]), "differences that vary"),  # the same lead, but for rounding
        (([1.0, 1.0], [2.0, 2.0]), "differences that vary"),
        (([1.0, 1.1, 1.2], [3.0, 3.2, 3.1], [2.0, None, None]), "against optim.lr=2 needs"),
        (([1.0, 1.11, 1.2], [3.0, 3.1, 3.2]), "beyond the noise"),
        (([1.0, 1.3, 1.2], [1.1, 1.1, 1.3], [3.0, 3.1, 3.3]), "within the noise"),
    ],
)
def test_verdicts(scores, said):
    """No warning and no NaN where a test cannot be made; the rival that it fails against is named."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = verdict(*scores)
    assert said in text and "nan" not in text.lower()


def rate(sweeps: int, spreads: list[float], seeds: int, lead: float = 0.0) -> float:
    """The share of simulated sweeps whose best configuration is called beyond the noise; with a lead, of the first one."""
    draw, beyond = random.Random(5), 0
    for _ in range(sweeps):
        scores = [[draw.gauss(-lead * (i == 0), spread) for _ in range(seeds)] for i, spread in enumerate(spreads)]
        text = verdict(*scores)
        beyond += "beyond the noise of seeds:" in text and (not lead or text.startswith("Best: optim.lr=0,"))
    return beyond / sweeps


def test_the_verdict_seldom_raises_a_false_alarm():
    """Sweeps in which all configurations are equally good. A test of the best against the second alone calls 10 to 19 % of
    them beyond the noise. The bounds are three standard errors above 5 %."""
    assert 0.02 < rate(1000, [1.0, 1.0], 3) < 0.071
    assert rate(1000, [0.1, 1.0, 1.0, 10.0], 3) < 0.071


@pytest.mark.slow
def test_the_verdict_has_the_error_rate_and_power_that_it_states():
    """5 % for two configurations, less for more; a lead of 2 standard deviations of the paired differences, which for
    independent losses is 2 sqrt(2) of theirs."""
    for count, seeds in itertools.product((2, 3, 5, 10), (3, 4, 5)):
        unequal = [10 ** (2 * i / (count - 1) - 1) for i in range(count)]
        for spreads in ([1.0] * count, [5.0] + [1.0] * (count - 1), unequal):
            assert rate(4000, spreads, seeds) < 0.0605, (spreads, seeds)
    assert rate(10_000, [1.0] * 5, 3, lead=2 * math.sqrt(2)) == pytest.approx(0.11, abs=0.012)
    assert rate(10_000, [1.0] * 5, 5, lead=2 * math.sqrt(2)) == pytest.approx(0.74, abs=0.015)


def test_the_picture_has_a_panel_for_each_key(tmp_path):
    """Curves and two keys, 5.5 inches and 4 for each key at 110 dpi; a row for each table."""
    jobs = combinations(trainer__max_steps=[100, 200], optim__lr=[0.001, 0.01], model__n_layer=[2, 4])
    write_sweep(tmp_path / "s", jobs, [2.0] * 8)
    results.update(Sweep.read(tmp_path / "s"))
    assert png_size((tmp_path / "s/results.png").read_bytes()) == (1485, 792)


@pytest.mark.parametrize(
    "jobs",
    [
        [
            {"data.path": "$x_{$ " + "long " * 30, "optim.lr": 10.0, "trainer.keep_every": None},
            {"data.path": "\x1b[31m雪\n", "optim.lr": 0.0, "trainer.keep_every": 9},
        ],
        [{"optim.lr": 10.0 ** -(i % 7), "optim.weight_decay": i / 7} for i in range(12)],
        [],
    ],
)
def test_any_value_can_be_drawn(tmp_path, jobs):
    """Signs that matplotlib takes for formulas, missing glyphs, mixed types, more configurations than colors, no runs."""
    write_sweep(tmp_path / "s", jobs, [2.0 + i for i in range(len(jobs))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = results.update(Sweep.read(tmp_path / "s"))
    assert png_size((tmp_path / "s/results.png").read_bytes())
    assert "\x1b" not in text


def test_nothing_is_written_or_imported_where_nothing_changed(tmp_path):
    """Sweeps are long, and update runs after each job; a sweep that is run again is done in seconds. Redrawn by a clock or
    without a look at the files, the times would change."""
    jobs = combinations(optim__lr=[0.001, 0.01], seed=[1, 2])
    write_sweep(tmp_path / "s", jobs, [2.0, 2.1, 2.2, None])

    def times() -> list[int]:
        return [(tmp_path / f"s/results.{suffix}").stat().st_mtime_ns for suffix in ("csv", "md", "png")]

    text, before = results.update(Sweep.read(tmp_path / "s")), times()
    code = f"""import sys; from pathlib import Path; from gptlab import results, sweep
print(results.update(sweep.Sweep.read(Path({str(tmp_path / "s")!r}))), end="")
assert not {{"torch", "scipy", "matplotlib", "lightning"}} & sys.modules.keys()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == text and times() == before
    write_run(tmp_path / "s/3", jobs[3], 2.3)
    assert "2.2500" in results.update(Sweep.read(tmp_path / "s"), picture=False)
    assert times()[0] > before[0] and times()[1] > before[1] and times()[2] == before[2]
    results.update(Sweep.read(tmp_path / "s"))
    assert times()[2] > before[2]
    for suffix in ("csv", "md", "png"):
        os.unlink(tmp_path / f"s/results.{suffix}")
        results.update(Sweep.read(tmp_path / "s"), picture=suffix == "png")
        assert all(times())


def test_texts_from_a_run_folder_do_no_harm(tmp_path):
    """Columns stay columns, a cell one line, and no control character reaches the terminal."""
    write_sweep(tmp_path / "s", [{"data.path": "a|b\nc"}, {"data.path": "\x1b]0;title\x07"}], [2.0, None])
    write_run(tmp_path / "s/1", {}, ended=None, error="x | y\x1b[2J")
    text = results.update(Sweep.read(tmp_path / "s"), picture=False)
    assert "a\\|b c" in text and "x \\| y\\x1b[2J" in text and "\x1b" not in text and "\x07" not in text


def test_tensorboard_lists_the_varied_keys_first(tmp_path):
    """TensorBoard sorts hyper-parameters by whether they differ, then by name; in the table without that, seed is last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    from gptlab.loggers import TensorBoard

    write_sweep(tmp_path / "s", [{"model": "gpt-nano", "seed": 3, "data.val_windows": 7}], [None])
    logger = TensorBoard(str(tmp_path / "s/0"))
    logger.log_hyperparams({"seed": 3, "optim": {"lr": 0.1}, "data": {"val_windows": 7}})
    logger.save()
    events = EventAccumulator(str(tmp_path / "s/0")).Reload()
    metadata = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    infos = HParamsPluginData.FromString(metadata).experiment.hparam_infos
    assert {info.name: info.differs for info in infos} == {
        "seed": True, "optim.lr": False, "data.val_windows": True, "model": True,
    }  # fmt: skip
    started = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert HParamsPluginData.FromString(started).session_start_info.hparams["model"].string_value == "gpt-nano"
