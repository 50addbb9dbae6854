"""python -m gptlab.evaluate: a run's own validation again, to the bit, and other data in the run's tokens."""

import json
import math
import shutil

import pytest
import torch
from conftest import DROPOUT, TEXT, TINY, metrics

from gptlab import sources
from gptlab.data.windows import Ids, ValBatches


def figures(gptlab, tmp_path, *arguments, **settings):
    (tmp_path / "figures.json").unlink(missing_ok=True)
    done = gptlab("evaluate", *arguments, "out=figures.json", **settings)
    return json.loads((tmp_path / "figures.json").read_text()), done.stdout


@pytest.mark.parametrize(
    "more",
    [
        ["callbacks=[default,ema]", "data.val_windows=null", "trainer.linear=onednn"],
        pytest.param(["trainer.precision=bf16"], marks=pytest.mark.slow),
    ],
)
def test_a_run_gets_its_own_numbers_again(gptlab, tmp_path, more):
    """With averaged weights, oneDNN, bf16, uneven micro-batches and dropout: the very bits of its validations, last and best, from
    the run folder and from a checkpoint that knows neither folder nor paths."""
    (tmp_path / "my.txt").write_text(TEXT)
    gptlab("train", *DROPOUT, *more, "data=text", "data.path=my.txt", "hydra.run.dir=run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    best, shown = figures(gptlab, tmp_path, "ckpt=run")
    last, _ = figures(gptlab, tmp_path, "ckpt=run/checkpoints/last.ckpt")
    for ours, theirs in ((best, summary["best"]), (last, summary["last"])):
        assert {f"val/{name}": ours[name] for name in ("loss", "perplexity", "bits_per_byte")}.items() <= theirs.items()
    assert f"{best['loss']:.4f} nats per token" in shown and best["data"] == summary["data"]
    assert (best["linear"] == "onednn") == ("trainer.linear=onednn" in more)  # on some CPUs, both give the same bits
    (tmp_path / "run/checkpoints/best.ckpt").rename(tmp_path / "alone.ckpt")
    assert "data.path is missing" in gptlab("evaluate", "ckpt=alone.ckpt", status=2).stderr
    alone, _ = figures(gptlab, tmp_path, "ckpt=alone.ckpt", "data.path=my.txt")
    assert {**alone, "weights": None} == {**best, "weights": None}


@pytest.fixture
def run(bottles):
    return bottles / "run"


def test_another_text_in_the_tokens_of_the_run(gptlab, tmp_path, run):
    """Against a loop of its own over every token; the training split and a shorter context, too."""
    other = TEXT[::-1].replace("\n", " ")
    (tmp_path / "other.txt").write_text(other)
    source = sources.load(str(run))
    ids, split = source.tokenizer.encode(other), int(0.9 * len(other))
    for part, block, arguments in (
        (ids[split:], 64, []),
        (ids[split:], 16, ["data.block_size=16"]),
        (ids[:split], 64, ["split=train"]),
    ):
        measured, _ = figures(gptlab, tmp_path, f"ckpt={run}", "data=text", "data.path=other.txt", *arguments)
        nats = 0.0
        for window, mask in ValBatches(Ids(part, source.tokenizer.vocab_size), block, None, 1, 0, 1):
            with torch.no_grad():
                log_p = source.model(window[:, :-1]).log_softmax(-1).gather(2, window[:, 1:, None])[..., 0]
            nats -= float((log_p * mask[:, 1:]).sum())
        assert measured["tokens"] == len(part) - 1 and measured["block_size"] == block
        assert measured["loss"] == pytest.approx(nats / (len(part) - 1), rel=1e-5)
        assert measured["bits_per_byte"] == pytest.approx(measured["loss"] / math.log(2), rel=1e-9)  # ASCII
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["data=text", "data.path=odd.txt"],
            "not in the vocabulary of the weights: 2 characters, such as 'é' (U+00E9), '€'",
        ),
        (["data=addition"], "data=addition has other tokens than"),
        (["data=text", "data.path=odd.txt", "data.tokenizer=char"], "has other tokens than"),
        (["data.block_size=65"], "data.block_size=65 must be <= 64"),
        (["precision=fp16"], "precision=fp16 needs a GPU"),
        (["out=."], "out=. exists; give a new file"),
        (["out=/proc/nowhere/x.json"], "cannot be written"),
        (["data.pth=x"], "unknown key data.pth; did you mean data.path?"),
    ],
)
def test_refused(gptlab, tmp_path, run, arguments, text):
    (tmp_path / "odd.txt").write_text("été €" * 200)
    error = gptlab("evaluate", f"ckpt={run}", *arguments, status=2).stderr
    assert text in error and "Traceback" not in error


def test_nothing_to_evaluate(gptlab):
    assert "ckpt is missing" in gptlab("evaluate", status=2).stderr


def test_problems_are_also_counted(gptlab, tmp_path):
    run = [argument for argument in TINY if "sample_text" not in argument]
    gptlab("train", *run, "data=addition", "data.ndigit=1", "callbacks=problems", "hydra.run.dir=run")
    measured, shown = figures(gptlab, tmp_path, "ckpt=run")
    logged = next(line for line in reversed(metrics(tmp_path / "run")) if "val/accuracy" in line)
    assert measured["accuracy"] == logged["val/accuracy"] and "answered exactly" in shown
    assert "has no end" in gptlab("evaluate", "ckpt=run", "split=train", status=2).stderr


def test_a_run_folder_from_elsewhere_downloads_nothing(gptlab, tmp_path, run):
    """Its config.yaml may name any address."""
    shutil.copytree(run, tmp_path / "theirs")
    text = (tmp_path / "theirs/config.yaml").read_text().replace("url: null", "url: http://localhost:1/evil")
    (tmp_path / "theirs/config.yaml").write_text(text)
    assert "add trust=true" in gptlab("evaluate", "ckpt=theirs", status=2).stderr
    for damage in ("data: null", "data: [1]", "name: x"):
        (tmp_path / "theirs/config.yaml").write_text(damage)
        error = gptlab("evaluate", "ckpt=theirs", status=2).stderr
        assert "data must be a mapping" in error and "Traceback" not in error


@pytest.mark.parametrize("trainer", [None, {"precision": [1], "threads": -1}, {"precision": "x", "threads": 10**6}])
def test_a_checkpoint_may_say_anything_about_its_training(gptlab, tmp_path, run, trainer):
    content = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    content["config"]["trainer"] = trainer
    torch.save(content, tmp_path / "odd.ckpt")
    odd, _ = figures(gptlab, tmp_path, "ckpt=odd.ckpt", f"data.path={run.parent}/my.txt")
    usual, _ = figures(gptlab, tmp_path, f"ckpt={run}")
    assert odd["precision"] == "32" and odd["loss"] == pytest.approx(usual["loss"], rel=1e-5)
