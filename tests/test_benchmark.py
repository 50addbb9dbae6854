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
import benchmark_memory  # noqa: E402
import benchmark_sample  # noqa: E402

STEPS = """
import time
for step in range(1000):
    print(f"iter {step}:", flush=True)
    time.sleep(0.05 if step > 10 else 0.2)
"""  # 20 steps per second after the 10th


def program(folder: Path, code: str) -> benchmark.Program:
    return benchmark.Program(
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
    speeds = benchmark.measure_speeds([program(tmp_path, STEPS)], warm_up=12, seconds=1.0)
    assert len(speeds) == 1 and 1000 < speeds[0] <= 2010  # at most 20 steps of 100 tokens per second
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize("code", ["print('iter 1:'); raise SystemExit('no such thing')", "print('no such thing')"])
def test_a_program_that_ends_is_an_error_with_its_output(tmp_path, code):
    """Else a run that failed would count as a slow one."""
    with pytest.raises(SystemExit, match="no such thing"):
        benchmark.measure_speeds([program(tmp_path, code)], warm_up=5, seconds=1)


def test_rounds_alternate_and_ratios_are_taken_within_a_round(tmp_path, monkeypatch, capsys):
    """The machine gets ten times slower from round to round; a ratio of medians would be 1, that of each round is 2."""
    order = []

    def part(options, folder):
        def measure(name):
            order.append(name)
            return {name: {"ours": 2.0, "theirs": 1.0}[name] * 10.0 ** (len(order) // 3)}

        return benchmark.Plan("s", [lambda: measure("ours"), lambda: measure("theirs")], [("ours", "theirs")])

    monkeypatch.setitem(benchmark.PARTS, "startup", part)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "startup", "--rounds=2", f"--json={tmp_path / 'out.json'}"])
    benchmark.main()
    report = json.loads((tmp_path / "out.json").read_text())
    assert order == ["ours", "theirs", "theirs", "ours"]
    assert report["values"] == {"ours": [2.0, 20.0], "theirs": [1.0, 10.0], "ours / theirs": [2.0, 2.0]}
    assert report["machine"]["cores"] >= 1 and report["machine"]["torch"]
    assert "ours / theirs" in capsys.readouterr().out


def test_a_program_that_made_no_steps_has_no_ratio():
    assert math.isnan(benchmark.summarize([{"a": 1.0, "b": 0.0}], [("a", "b")])["a / b"][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "part, column", [("startup", "until first step"), ("guards", "without guards"), ("busy", "two at once")]
)
def test_parts_run(tmp_path, part, column):
    """On gptlab as it is: the step without guards reaches into the module."""
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), part, "--rounds=1", "--seconds=2", "--warm-up=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert column in done.stdout


TINY = benchmark_sample.Size(20, 16, {"n_layer": 1, "n_head": 2, "n_embd": 16, "bias": True}, tokens=12)


def test_sampling_is_measured_on_every_side(monkeypatch, capsys):
    monkeypatch.setitem(benchmark_sample.SIZES, "baby", TINY)
    monkeypatch.setattr(benchmark_sample, "ELEMENTS", 2**16)
    command = ["benchmark.py", "sample", "--size", "baby", "--batch", "1", "2", "--rounds", "2", "--profile"]
    peer = os.environ.get("GPTLAB_TEST_NANOGPT")
    monkeypatch.setattr(sys, "argv", [*command, "--peer", peer] if peer else command)
    benchmark.main()
    table = capsys.readouterr().out.split("round 2 of 2")[1]
    sides = ["gptlab fp32", "Hugging Face fp32", "gptlab fp32, % attention"] + ["nanoGPT fp32"] * bool(peer)
    for batch, side in itertools.product((1, 2), sides):
        assert float(re.search(rf"baby, batch {batch}: {side} +([\d,.]+)", table)[1].replace(",", "")) > 0
    shares = re.findall(r"batch 2: gptlab fp32, % [\w ]+? +([\d.]+)", table)
    assert len(shares) == 8 and sum(map(float, shares)) == pytest.approx(100, abs=5)  # of medians
    assert "baby, batch 1: gptlab fp32 / baby, batch 1: Hugging Face fp32" in table and "memory read, GB/s" in table


def test_all_sides_are_the_same_model():
    torch.manual_seed(1)
    model = benchmark_sample.GPT(vocab_size=20, block_size=16, **TINY.model).eval()
    idx = torch.randint(20, (2, 16))
    with torch.no_grad():
        logits = model(idx)
        torch.testing.assert_close(benchmark_sample.hugging_face(model)(idx).logits, logits)
        if peer := os.environ.get("GPTLAB_TEST_NANOGPT"):
            torch.testing.assert_close(benchmark_sample.nanogpt(model, TINY, Path(peer))(idx, idx)[0], logits)


def test_memory_of_a_step(monkeypatch, capsys):
    """The parent looks at the last line alone, whatever libraries print before it."""
    monkeypatch.setattr(benchmark_memory, "VOCAB_SIZE", 20)
    monkeypatch.setattr(benchmark_memory, "SIZE", benchmark_memory.SIZE | {"block_size": 8, "n_layer": 1, "n_embd": 24})
    peer = os.environ.get("GPTLAB_TEST_NANOGPT")
    for program in ("gptlab", "nanoGPT")[: 1 + bool(peer)]:
        benchmark_memory.main(program, peer or "", "cpu", "False")
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert figures.keys() == {"GB", "s"} and 0.05 < figures["GB"] < 100 and 0 < figures["s"] < 10


def test_memory_compares_with_the_peer_of_the_same_kind():
    measurements, ratios = benchmark_memory.columns(Path("peer"), "cuda", compiled=True)
    assert [measure.args[0] for measure in measurements] == [
        "gptlab", "nanoGPT", "gptlab compiled", "nanoGPT compiled"
    ]  # fmt: skip
    assert ratios[0] == ("gptlab, GB", "nanoGPT, GB") and ratios[3] == ("gptlab compiled, s", "nanoGPT compiled, s")
