"""scripts/benchmark.py: how it measures and reports, on small stand-ins for training programs."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import benchmark  # noqa: E402
import benchmark_ceiling  # noqa: E402
import benchmark_memory  # noqa: E402
import benchmark_peers  # noqa: E402
import benchmark_programs  # noqa: E402
import benchmark_sample  # noqa: E402
import benchmark_time  # noqa: E402
import benchmark_train  # noqa: E402

NANOGPT, MINGPT, SHAKESPEARE = (os.environ.get(f"GPTLAB_TEST_{name}") for name in ("NANOGPT", "MINGPT", "SHAKESPEARE"))
STEPS = """
import time
for step in range(1000):
    print(f"iter {step}:", flush=True)
    time.sleep(0.05 if step > 10 else 0.2)
"""  # 20 steps per second after the 10th


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    monkeypatch.setattr(benchmark, "cores_in_use", lambda: 0.0)


@pytest.fixture
def peers(tmp_path):
    """Folders that pass for clones of nanoGPT and minGPT."""
    for file in ("nanoGPT/train.py", "minGPT/mingpt/trainer.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    return ["--peer", str(tmp_path / "nanoGPT"), "--mingpt", str(tmp_path / "minGPT")]


def run(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, argv)])
    benchmark.main()


def program(folder: Path, code: str) -> benchmark_programs.Program:
    return benchmark_programs.Program(
        [sys.executable, "-c", code],
        cwd=folder,
        output=folder / "output.txt",
        log=folder / "output.txt",
        step_pattern=r"iter (\d+):",
        tokens_per_step=lambda: 100,
    )


def test_speed_is_that_after_the_warm_up(tmp_path):
    """The first steps are slow: counted in, they would lower the speed. The program, which would run for 50 s, is ended."""
    began = time.perf_counter()
    speeds = benchmark_programs.measure_speeds([program(tmp_path, STEPS)], warm_up=12, seconds=1.0)
    assert len(speeds) == 1 and 1000 < speeds[0] <= 2010  # at most 20 steps of 100 tokens per second
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("code", ["print('iter 1:'); raise SystemExit('no such thing')", "print('no such thing')"])
def test_a_program_that_ends_is_an_error_with_its_output(tmp_path, code):
    """Else a run that failed would count as a slow one."""
    with pytest.raises(SystemExit, match="no such thing"):
        benchmark_programs.measure_speeds([program(tmp_path, code)], warm_up=5, seconds=1)


def test_a_whole_program_that_fails_is_an_error_with_its_output(tmp_path):
    """Else a run that fails at once would be the fastest."""
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(SystemExit, match="no such thing"):
        benchmark_programs.time_of(command, tmp_path, tmp_path / "output.txt", {})
    assert benchmark_programs.time_of(command, tmp_path, tmp_path / "output.txt", {}, status=1) > 0


def test_rounds_alternate_and_ratios_are_taken_within_a_round(tmp_path, monkeypatch, capsys):
    """The machine gets ten times slower from round to round; a ratio of medians would be 1, that of each round is 2."""
    order = []

    def part(options, folder):
        def measure(name):
            order.append(name)
            return {name: {"ours": 2.0, "theirs": 1.0}[name] * 10.0 ** (len(order) // 3)}

        return benchmark.Plan("s", [lambda: measure("ours"), lambda: measure("theirs")], [("ours", "theirs")])

    monkeypatch.setitem(benchmark.PARTS, "startup", part)
    run(monkeypatch, "startup", "--rounds=2", f"--json={tmp_path / 'out.json'}")
    report = json.loads((tmp_path / "out.json").read_text())
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert report["values"] == {"ours": [2.0, 20.0], "theirs": [1.0, 10.0], "ours / theirs": [2.0, 2.0]}
    assert report["machine"]["cores"] >= 1 and report["software"]["torch"] and report["software"]["gptlab"]
    assert not report["warnings"]
    assert "ours / theirs" in capsys.readouterr().out


def test_both_files_say_that_the_machine_was_busy_and_what_is_missing(tmp_path, monkeypatch, capsys):
    """On the screen alone, a warning is lost once the table is published."""
    plan = benchmark.Plan("s", [lambda: {"ours": 2.0}], notes=["no column for nanoGPT"])
    monkeypatch.setitem(benchmark.PARTS, "startup", lambda options, folder: plan)
    load = iter([0.7, 0.05, 0.3])
    monkeypatch.setattr(benchmark, "cores_in_use", lambda: next(load))
    out = tmp_path / "out.json", tmp_path / "out.md"
    run(monkeypatch, "startup", "--rounds=3", f"--json={out[0]}", f"--markdown={out[1]}")
    for text in (out[0].read_text(), out[1].read_text()):
        assert "kept 0.7 cores busy before round 1" in text and "kept 0.3 cores busy before round 3" in text
        assert "before round 2" not in text and "no column for nanoGPT" in text and torch.__version__ in text
    assert re.search(r"^\| ours +\| +2\.000 \|", out[1].read_text(), re.MULTILINE)
    assert "warning: other processes kept 0.7" in capsys.readouterr().out


def test_a_program_that_made_no_steps_has_no_ratio():
    assert math.isnan(benchmark.summarize([{"a": 1.0, "b": 0.0}], [("a", "b")])["a / b"][0])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["prepare"], "prepare needs --peer"),
        (["time_to_loss", "--peer", "{}/nanoGPT"], "time_to_loss needs --shakespeare"),
        (
            ["time_to_loss", "--peer", "{}/nanoGPT", "--shakespeare", __file__, "--rounds", "2"],
            "one for each of --seeds",
        ),
        (["train", "--peer", "{}"], "no such file {}/train.py"),
        (["train", "--mingpt", "{}/nanoGPT"], "no such file {}/nanoGPT/mingpt/trainer.py"),
        (["train", "--size", "124M"], "train has cpu, baby, gpu"),
        (["sample", "--size", "cpu"], "sample has baby, 124M"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(tmp_path, peers, capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse([word.format(tmp_path) for word in argv])
    assert message.format(tmp_path) in capsys.readouterr().err


def test_a_folder_in_a_repository_has_no_commit_of_its_own(tmp_path):
    """git answers for the repository around it: the report would name the wrong commit."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "nanoGPT").mkdir()
    assert benchmark.commit_of(tmp_path / "nanoGPT") == "unknown commit"


@pytest.mark.parametrize("accelerate", [True, False])
def test_training_is_compared_with_the_peers_that_are_present(tmp_path, monkeypatch, peers, accelerate):
    """Every program of a table has the same GOMP_SPINCOUNT; a missing peer is named, not left out silently."""
    monkeypatch.setattr(benchmark_train, "lacks_trainer", lambda: None if accelerate else "pip install accelerate")
    monkeypatch.setattr(benchmark_train.linear, "fast_bf16", lambda: False)
    started = []
    monkeypatch.setattr(benchmark_programs, "measure_speeds", lambda programs, *_: started.extend(programs) or [6.0])
    monkeypatch.setattr(benchmark_programs, "time_of", lambda command, cwd, out, env: out.write_text("1e9\n"))
    if not accelerate:
        peers = peers[:2]
    plan = benchmark_train.train(benchmark.parse(["train", "--spincount=7", *peers]), tmp_path)
    values = {column: value for measure in plan.measurements for column, value in measure().items()}
    theirs = ["nanoGPT", "minGPT", "Hugging Face"] if accelerate else ["nanoGPT"]
    assert [*values][3:] == [f"cpu: {name} fp32" for name in ["gptlab", *theirs]]
    assert values["cpu: ceiling fp32"] == pytest.approx(1e9 / values["cpu: MFLOP per token"] / 1e6)
    assert all(program.environment["GOMP_SPINCOUNT"] == "7" for program in started)
    assert ("cpu: gptlab fp32", "cpu: ceiling fp32") in plan.ratios and len(plan.ratios) == 1 + len(theirs)
    missing = "".join(plan.notes)
    assert ("minGPT" in missing) == ("pip install accelerate" in missing) == (not accelerate)


def test_a_cpu_that_multiplies_bf16_has_a_column_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_train.linear, "fast_bf16", lambda: True)
    monkeypatch.setattr(benchmark_ceiling, "flops_per_token", lambda *_: 1e6)
    plan = benchmark_train.train(benchmark.parse(["train", "--size", "cpu", "baby"]), tmp_path)
    for size in ("cpu", "baby"):
        assert {(f"{size}: gptlab {p}", f"{size}: ceiling {p}") for p in ("fp32", "bf16")} <= {*plan.ratios}


def test_two_runs_at_once_are_compared_with_two_of_the_peer(tmp_path, monkeypatch, peers):
    """As it comes, and with gptlab's setting: else the table would only tell that the setting is missing there."""
    spincounts = {}

    def measure_speeds(programs, *_):
        for program in programs:
            kind = "nanoGPT" if "train.py" in program.command else "gptlab"
            spincounts.setdefault(kind, []).append(program.environment.get("GOMP_SPINCOUNT"))
        return [6.0] * len(programs)

    monkeypatch.setattr(benchmark_programs, "measure_speeds", measure_speeds)
    plan = benchmark_train.busy(benchmark.parse(["busy", *peers]), tmp_path)
    values = {column: value for measure in plan.measurements for column, value in measure().items()}
    assert spincounts == {"gptlab": ["1000"] * 4, "nanoGPT": [None, None, "1000", "1000"]}
    assert values["cpu: gptlab two at once"] == 12.0 == values["cpu: nanoGPT two at once, as it comes"]
    assert ("cpu: gptlab two at once", "cpu: nanoGPT two at once, GOMP_SPINCOUNT=1000") in plan.ratios


def test_the_counted_operations_are_those_of_the_formula():
    """Fused attention would be left out: a quarter of a step at a long context."""
    size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64}
    formula = benchmark_ceiling.GPT(vocab_size=20, **size).flops_per_token()
    counted = benchmark_ceiling.flops_per_token(20, size | {"dropout": 0.2, "batch_size": 3})
    assert counted == pytest.approx(formula, rel=0.02)  # it counts the parameters of LayerNorm, too


def test_the_peak_is_that_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr(benchmark_ceiling, "time_of", lambda product, device: product() is None or 0.5)
    assert benchmark_ceiling.gemm_peak("fp32", "cpu", tries=1) in (2 * 2048**3, 4 * 2048**3)


def test_all_peers_read_the_same_windows(tmp_path):
    """Shifted wrongly, a peer would learn another task; ids beyond int8 come back as they were."""
    text = "the quick brown fox"
    assert benchmark_programs.write_nanogpt_data(tmp_path, text) == len(set(text))
    ids = torch.tensor([sorted(set(text)).index(char) for char in text])
    windows = benchmark_peers.Windows(tmp_path, 4)
    assert len(windows) == int(0.9 * len(text)) - 4 and windows[len(windows) - 1].tolist() == ids[12:17].tolist()
    x, y = benchmark_peers.Pairs(tmp_path, 4)[3]
    assert x.tolist() == ids[3:7].tolist() and y.tolist() == ids[4:8].tolist()
    example = benchmark_peers.Examples(tmp_path, 4)[3]
    assert example["input_ids"].tolist() == example["labels"].tolist() == x.tolist()


def test_time_to_loss_takes_a_seed_a_round(tmp_path, monkeypatch, peers):
    """The recipe of nanoGPT's README beside gptlab's experiments; a round whose seed was measured before would hide the
    spread between seeds."""
    text, commands = tmp_path / "text.txt", []
    text.write_text("to be or not to be")

    def time_of(command, cwd, output, environment, status=0):
        commands.append(" ".join(command))
        keys = dict(word.split("=", 1) for word in command if "=" in word)
        if "gptlab.train" in command:
            folder = Path(keys["hydra.run.dir"])
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps({"last": {"val/loss": int(keys["seed"]) / 100}}))
        elif "gptlab.evaluate" in command:
            Path(keys["out"]).write_text('{"loss": 1.9}')
        return 60.0 if "train.py" in command else 20.0

    monkeypatch.setattr(benchmark_programs, "time_of", time_of)
    out = tmp_path / "out.json"
    argv = ["--shakespeare", text, "--seeds", 160, 162, "--experiment", "shakespeare_char_speedrun_160", "--json", out]
    run(monkeypatch, "time_to_loss", "model.n_layer=2", *peers, *argv)
    values = json.loads(out.read_text())["values"]
    name = "shakespeare_char_speedrun_160"
    assert values["nanoGPT, loss"] == [1.9, 1.9] and values[f"{name}, loss (target 1.60 in 1/2)"] == [1.6, 1.62]
    assert values[f"nanoGPT / {name}"] == [3.0, 3.0]
    recipe = next(command for command in commands if "train.py" in command)
    assert "train.py config/train_shakespeare_char.py" in recipe and "--max_iters=2000" in recipe
    assert any("seed=162" in command and "model.n_layer=2" in command for command in commands)


@pytest.mark.slow
@pytest.mark.skipif(not (NANOGPT and SHAKESPEARE), reason="GPTLAB_TEST_NANOGPT and GPTLAB_TEST_SHAKESPEARE name them")
def test_time_to_loss_for_real(tmp_path, monkeypatch):
    """The checkpoint that nanoGPT leaves is read and evaluated on the text that it was trained on."""
    monkeypatch.setitem(benchmark_time.RECIPE, "max_iters", 250)
    argv = ["--peer", NANOGPT, "--shakespeare", SHAKESPEARE, "--seeds", 1, "--experiment", "shakespeare_char"]
    run(monkeypatch, "time_to_loss", "trainer.max_steps=20", *argv, "--json", tmp_path / "out.json")
    values = json.loads((tmp_path / "out.json").read_text())["values"]
    assert 2.3 < values["nanoGPT, loss"][0] < 2.6 and 2.9 < values["shakespeare_char, loss"][0] < 3.4
    assert values["nanoGPT"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, column",
    [
        ("startup", "until first step"),
        ("guards", "without guards"),
        ("busy", "two at once"),
        ("step", "cpu: backward"),
        ("train", "ceiling fp32"),
    ],
)
def test_parts_run(tmp_path, part, column):
    """On gptlab as it is: the step without guards reaches into the module."""
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), part, "--rounds=1", "--seconds=2", "--warm-up=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert column in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name, path", [("nanoGPT", NANOGPT), ("minGPT", MINGPT), ("Hugging Face", None)])
def test_peers_train(tmp_path, name, path):
    """Their interfaces are as the benchmark uses them."""
    options = benchmark.parse(["train"])
    if name == "Hugging Face" and (why := benchmark_train.lacks_trainer()):
        pytest.skip(why)
    if name != "Hugging Face" and not path:
        pytest.skip(f"GPTLAB_TEST_{name.upper()} names no clone")
    options.peer, options.mingpt = (Path(path) if path and key == name else None for key in ("nanoGPT", "minGPT"))
    benchmark_programs.write_nanogpt_data(tmp_path, "to be or not to be, that is the question " * 50)
    start = next(start for column, start in benchmark_train.peers("cpu", options, tmp_path).items() if name in column)
    assert benchmark_programs.measure_speeds([start()], warm_up=10, seconds=1)[0] > 0


TINY = benchmark_sample.Size(20, 16, {"n_layer": 1, "n_head": 2, "n_embd": 16, "bias": True}, tokens=12)


def test_sampling_is_measured_on_every_side(monkeypatch, capsys):
    monkeypatch.setitem(benchmark_sample.SIZES, "baby", TINY)
    monkeypatch.setattr(benchmark_sample, "ELEMENTS", 2**16)
    argv = ["sample", "--size", "baby", "--batch", "1", "2", "--rounds", "2", "--profile"]
    run(monkeypatch, *argv, *(["--peer", NANOGPT] if NANOGPT else []))
    table = capsys.readouterr().out.split("round 2 of 2")[1]
    sides = ["gptlab fp32", "Hugging Face fp32", "gptlab fp32, % attention"] + ["nanoGPT fp32"] * bool(NANOGPT)
    for batch, side in itertools.product((1, 2), sides):
        assert float(re.search(rf"baby, batch {batch}: {side} +\| +([\d,.]+)", table)[1].replace(",", "")) > 0
    shares = re.findall(r"batch 2: gptlab fp32, % [\w ]+?\| +([\d.]+)", table)
    assert len(shares) == 8 and sum(map(float, shares)) == pytest.approx(100, abs=5)  # of medians
    assert "baby, batch 1: gptlab fp32 / baby, batch 1: Hugging Face fp32" in table and "memory read, GB/s" in table


def test_all_sides_are_the_same_model():
    torch.manual_seed(1)
    model = benchmark_sample.GPT(vocab_size=20, block_size=16, **TINY.model).eval()
    idx = torch.randint(20, (2, 16))
    with torch.no_grad():
        logits = model(idx)
        torch.testing.assert_close(benchmark_sample.hugging_face(model)(idx).logits, logits)
        if NANOGPT:
            torch.testing.assert_close(benchmark_sample.nanogpt(model, TINY, Path(NANOGPT))(idx, idx)[0], logits)


def test_memory_of_a_step(monkeypatch, capsys):
    """The parent looks at the last line alone, whatever libraries print before it."""
    monkeypatch.setattr(benchmark_memory, "VOCAB_SIZE", 20)
    monkeypatch.setattr(benchmark_memory, "SIZE", benchmark_memory.SIZE | {"block_size": 8, "n_layer": 1, "n_embd": 24})
    for program in ("gptlab", "nanoGPT")[: 1 + bool(NANOGPT)]:
        benchmark_memory.main(program, NANOGPT or "", "cpu", "False")
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures.keys() == {"GB", "s"} and 0.05 < figures["GB"] < 100 and 0 < figures["s"] < 10


def test_memory_compares_with_the_peer_of_the_same_kind():
    measurements, ratios = benchmark_memory.columns(Path("peer"), "cuda", compiled=True)
    assert [measure.args[0] for measure in measurements] == [
        "gptlab", "nanoGPT", "gptlab compiled", "nanoGPT compiled"
    ]  # fmt: skip
    assert ratios[0] == ("gptlab, GB", "nanoGPT, GB") and ratios[3] == ("gptlab compiled, s", "nanoGPT compiled, s")
