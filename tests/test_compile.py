"""model.compile=true: torch.compile, in place. Compiling for real takes most of a minute, so that test is a slow one."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from composed import composed
from conftest import TINY, same, weights

from gptlab import config
from gptlab.model import GPT
from gptlab.tokenizer import CharTokenizer
from gptlab.train import make_module

SMALLEST = {"n_layer": 1, "n_head": 1, "n_embd": 16}


@pytest.mark.parametrize(
    "options", [{}, {"activation_checkpointing": True}, {"position": "rotary", "ngrams": [2, 3], "tie_weights": False}]
)
def test_the_forward_pass_is_one_graph(options):
    """`fullgraph` raises at the first thing that cannot be compiled, such as a look at the values of the ids; the
    backend "eager" runs the graph as it was captured, without compiling it."""
    torch.compiler.reset()
    model = GPT(vocab_size=11, block_size=8, **SMALLEST, **options)
    batches = [torch.randint(0, 11, shape) for shape in ((5, 8), (3, 8), (1, 4))]
    expected = [model(ids) for ids in batches]
    model.compile(fullgraph=True, backend="eager")
    for training in (True, False):
        for ids, logits in zip(batches, expected, strict=True):
            assert torch.equal(model.train(training)(ids), logits)


def test_compiling_renames_no_parameter():
    """torch.compile(model) would put `_orig_mod.` before every name in a checkpoint."""
    values, references = composed("train", "hardware=cpu", "model=gpt-nano")
    data = SimpleNamespace(tokenizer=CharTokenizer("ab"), block_size=8, micro_batch_size=None, record={})
    made = {}
    for on in (False, True):
        cfg = config.validate(config.with_value(values, "model.compile", on), "train", references)
        made[on] = make_module(cfg, data, cfg.model_dump())
        assert (made[on].model._compiled_call_impl is not None) == on
    assert list(made[True].state_dict()) == list(made[False].state_dict())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_a_run_like_any_other(gptlab, tmp_path):
    """Its checkpoints have the names of any run, a resume is bitwise, a sample needs no compiler, and nothing that a
    user can do nothing about is printed."""
    small = [f"model.{key}={value}" for key, value in SMALLEST.items()]
    common = [*TINY, *small, "data.block_size=8", "model.compile=true", "model.dropout=0.2"]

    def train(*arguments: str) -> None:
        assert gptlab("train", *arguments, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")).stderr == ""

    train(*common, "trainer.max_steps=3", "hydra.run.dir=run")
    train("resume=run", "trainer.max_steps=5")
    train(*common, "trainer.max_steps=5", "hydra.run.dir=whole")
    assert not any("_orig_mod" in name for name in weights(tmp_path / "run"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert gptlab("sample", "ckpt=run", "prompt=The", "max_new_tokens=9").stdout.startswith("The")
