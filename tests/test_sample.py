"""Train, then sample from another folder with nothing but the checkpoint."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY

from gptlab.linear import fast_bf16
from gptlab.sample import TextStream


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One checkpoint file, alone in a folder."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "gptlab.train", *TINY, "hydra.run.dir=run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    alone = tmp_path_factory.mktemp("alone") / "model.ckpt"
    shutil.copy(folder / "run/checkpoints/best.ckpt", alone)
    shutil.rmtree(folder)
    return alone


def test_samples_from_the_file_alone(gptlab, tmp_path, checkpoint):
    text = gptlab(
        "sample", f"ckpt={checkpoint}", "prompt=The if statement, is: a 'test' = ", "max_new_tokens=30"
    ).stdout
    assert text.startswith("The if statement, is: a 'test' = ")
    assert len(text) == len("The if statement, is: a 'test' = ") + 30 + 1
    assert list(tmp_path.iterdir()) == []  # and leaves nothing behind


def test_seed_temperature_and_number(gptlab, checkpoint):
    def sample(*arguments):
        return gptlab("sample", f"ckpt={checkpoint}", "prompt=a", "max_new_tokens=40", *arguments).stdout

    assert sample("seed=1") == sample("seed=1") != sample("seed=2")
    assert sample("temperature=0", "seed=1") == sample("temperature=0", "seed=2")
    assert sample("top_k=1", "seed=1") == sample("temperature=0")
    several = sample("num_samples=35", "seed=1").removesuffix("\n").split("\n\n" + "-" * 20 + "\n")  # two batches
    assert len(several) == 35 and len({*several}) == 35
    assert [text + "\n" for text in (several[0], several[1], several[34])] == [sample(f"seed={i}") for i in (1, 2, 35)]


def test_filters_stop_and_context(gptlab, checkpoint):
    """The model's context is 64 tokens."""

    def sample(*arguments):
        return gptlab("sample", f"ckpt={checkpoint}", "prompt=a", "max_new_tokens=90", "seed=1", *arguments).stdout

    whole = sample("top_k=null")
    greedy = sample("temperature=0")
    assert greedy == sample("top_k=null", "top_p=1e-6") == sample("top_k=null", "min_p=1.0") != whole
    at = whole.index(whole[20:24], 1)
    assert sample("top_k=null", f"stop={whole[20:24]}").removesuffix("\n") == whole[:at]
    assert sample("top_k=null", "stop=never there") == whole
    half = sample("top_k=null", "context=half")
    assert half[:64] == whole[:64] and half != whole and len(half) == len(whole)
    assert sample("top_k=null", "precision=32") == whole or fast_bf16()


class Spelled:
    """A tokenizer whose ids are the letters of a string."""

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("stop", ["aab", "aaab", "b", "x", None])
def test_what_may_begin_the_stop_is_held_back(stop):
    """Whatever arrives when: all pieces together are the text before the first `stop`, and none is taken back."""
    text = "aaaabaacaab"
    stream = TextStream(Spelled(), [ord("a")], stop)  # the prompt's own letter does not count
    pieces = [stream.add(ord(letter)) for letter in text]
    expected = text.partition(stop)[0] if stop else text
    assert "".join(pieces) + stream.finish() == expected
    assert stream.ended == (stop is not None and stop in text)


def test_incomplete_characters_are_held_back():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", "replace")

    stream = TextStream(Bytes(), [*"é".encode()], None)
    assert [stream.add(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.add(0xE2) == "" and stream.finish() == "\ufffd"


def test_prompt_file(gptlab, tmp_path, checkpoint):
    (tmp_path / "my prompt.txt").write_text("Two\nlines ${x}: ".replace("$", "%"))
    shown = gptlab("sample", f"ckpt={checkpoint}", "prompt_file=my prompt.txt", "max_new_tokens=1").stdout
    assert shown.startswith("Two\nlines %{x}: ")


def test_without_a_prompt_a_newline_is_continued(gptlab, checkpoint):
    begun = gptlab("sample", f"ckpt={checkpoint}", "max_new_tokens=30", "seed=3").stdout
    assert begun == gptlab("sample", f"ckpt={checkpoint}", "max_new_tokens=30", "seed=3", "prompt=").stdout
    assert begun.startswith("\n") and len(begun) == 32


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prompt=naïve €"], "prompt: character 'ï' (U+00EF, at position 2)"),
        (["device=abacus"], "device=abacus: not available"),
        (["prompt=a", "prompt_file=b"], "exclude each other"),
        (["prompt_file=nowhere"], "prompt_file=nowhere: No such file"),
        (["ckpt=nowhere"], "nowhere is not a run folder"),
        (["ckpt=latest"], "latest: no runs under"),
        (["ckpt=null"], "ckpt is missing"),
        (["init_from=gpt2"], "ckpt and init_from exclude each other"),
        (["meta=nowhere"], "meta=nowhere: describes the tokens of nanoGPT's checkpoint"),
        *([] if fast_bf16() else [(["precision=bf16"], "does not multiply bfloat16")]),
    ],
)
def test_refused(gptlab, checkpoint, arguments, text):
    """What the schema cannot see; types and ranges are in test_config."""
    stderr = gptlab("sample", f"ckpt={checkpoint}", *arguments, status=2).stderr
    assert text in stderr and stderr.startswith("\nerror: ") and "Traceback" not in stderr


def test_latest_is_the_newest_run_here(gptlab, tmp_path, checkpoint):
    for name, age in (("a/old", 100), ("b/new", 0)):
        run = tmp_path / "outputs" / name
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, run / "checkpoints/best.ckpt")
        for file in ("config.yaml", "run.json"):
            (run / file).write_text("{}")
            os.utime(run / file, (time.time() - age,) * 2)
    (tmp_path / "outputs/a/old/checkpoints/best.ckpt").write_bytes(b"damaged")
    assert gptlab("sample", "ckpt=latest", "prompt=a", "max_new_tokens=1").stdout.startswith("a")


def test_a_run_folder_without_checkpoints(gptlab, tmp_path):
    (tmp_path / "run").mkdir()
    assert "not a run folder" in gptlab("sample", "ckpt=run", status=2).stderr
    (tmp_path / "run/config.yaml").touch()
    assert "saved nothing yet" in gptlab("sample", "ckpt=run", status=2).stderr


class Payload:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint", {"state_dict": {}}, [1], Payload(),
     {"state_dict": {}, "config": {"model": {"_target_": "os.system"}, "data": {"block_size": 4}}, "tokenizer": {"type": "char", "chars": "ab"}},
     # a known class in the wrong place would be built before its sizes are compared with the weights
     {"state_dict": {}, "data": {}, "config": {"model": {"_target_": "gptlab.model.GPT"}, "data": {"block_size": 4}},
      "tokenizer": {"_target_": "gptlab.model.GPT", "vocab_size": 9, "block_size": 9, "n_layer": 1, "n_head": 1, "n_embd": 9}}],
)  # fmt: skip
def test_foreign_files_are_refused_and_never_run(gptlab, tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "file.ckpt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "file.ckpt")
    done = gptlab("sample", "ckpt=file.ckpt", status=2)
    assert done.stderr.startswith("\nerror: file.ckpt") and "Traceback" not in done.stderr
    assert "code from a checkpoint ran" not in done.stdout


def test_damaged_file_is_refused(gptlab, tmp_path, checkpoint):
    for size in (5000, -1000):
        (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:size])
        assert "error: cut.ckpt" in gptlab("sample", "ckpt=cut.ckpt", status=2).stderr


@pytest.mark.slow
def test_sweep_over_seeds(gptlab, tmp_path, checkpoint):
    shown = gptlab("sample", "-m", f"ckpt={checkpoint}", "prompt=a", "max_new_tokens=5", "seed=1,2").stdout
    assert len([line for line in shown.splitlines() if line.startswith("a")]) == 2
