"""gptlab.sizing: its numbers against real modules, torch's FLOP counter, real checkpoints, and a known training."""

import copy
import re

import pytest
import torch
from composed import composed, errors
from conftest import TINY
from test_cli import modules_after
from torch.utils.flop_counter import FlopCounterMode

from gptlab import config, sizing
from gptlab.config import CONF
from gptlab.errors import UserError
from gptlab.model import GPT

SHAPES = {
    "one layer": {"n_layer": 1, "n_head": 1, "n_embd": 8},
    "biases": {"n_layer": 2, "n_head": 4, "n_embd": 16, "bias": True, "gelu": "tanh"},
    "padded vocabulary": {"n_layer": 3, "n_head": 2, "n_embd": 12, "vocab_multiple": 64},
    "wide, one head": {"n_layer": 2, "n_head": 1, "n_embd": 48, "dropout": 0.1},
}


@pytest.fixture
def report(monkeypatch, capsys):
    """Title -> row -> cells, of what the program prints for a config. `memory=False`: without the estimate, which has its
    own tests and takes seconds for large models."""

    def run(*overrides: str, memory: bool = True) -> dict[str, dict[str, list[str]]]:
        if not memory:
            monkeypatch.setattr("gptlab.memory.estimate_step", lambda *_, **__: None)
        sizing.size(config.validate(copy.deepcopy(composed("sizing", *overrides)[0]), "sizing"))
        tables = {}
        for block in capsys.readouterr().out.strip().split("\n\n"):
            title, *rows = block.splitlines()
            cells = [re.split(r"  +", row.strip()) for row in rows]
            tables[re.split(r"[,:(]| for| \d", title)[0].strip()] = {name: rest for name, *rest in cells}
        return tables

    return run


def number(cell: str) -> int:
    return int(cell.split()[0].replace(",", ""))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_real_model(shape):
    """Each part against the tensors of the module it names; a part that is missed or counted twice changes the sum."""
    model = GPT(vocab_size=70, block_size=20, **shape)
    blocks = model.transformer.h
    real = {
        "token embedding": model.transformer.wte,
        "position embedding": model.transformer.wpe,
        "attention": torch.nn.ModuleList(block.attn for block in blocks),
        "MLP": torch.nn.ModuleList(block.mlp for block in blocks),
        "LayerNorms": torch.nn.ModuleList([model.transformer.ln_f, *(n for b in blocks for n in (b.ln_1, b.ln_2))]),
    }
    expected = {part: sum(p.numel() for p in module.parameters()) for part, module in real.items()}
    counted = sizing.count_parameters(model)
    assert counted == {**expected, "head (tied)": 0}
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flops_are_those_that_torch_counts(shape):
    """Exactly, forward and backward, where attention is plain matrix products (on meta tensors). A fused kernel's
    backward pass would count a fifth product: it computes the scores again."""
    T = 20
    with torch.device("meta"):
        model = GPT(vocab_size=70, block_size=T, **shape)
        ids = torch.zeros(3, T, dtype=torch.int64)
        flops = sizing.forward_flops(model, T)
        with FlopCounterMode(display=False) as forward:
            logits = model(ids)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    assert forward.get_total_flops() == 3 * T * sum(flops.values())
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    counted = forward.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.bmm] == 3 * T * flops["attention, scores (grow with block_size)"]
    # What train/mfu uses counts biases and LayerNorms, too.
    assert sum(flops.values()) * 3 <= model.flops_per_token() <= sum(flops.values()) * 3.3


def test_gpt2_on_eight_a100(report):
    """Published: 124,439,808 parameters; nanoGPT's own run took about 4 days for 300 B tokens."""
    found = report("model=gpt2", "tokens=300e9", "trainer.devices=8", memory=False)
    assert found["parameters"]["total"][0] == "124,439,808"
    assert found["parameters"]["without embeddings"][0] == "85,056,000"
    assert found["FLOPs per token"]["total"] == ["284,812,800", "854,438,400"]
    assert found["time"]["A100"] == ["312 TFLOP/s", "4.0 days"]  # 300e9 * 854438400 / (8 * 312e12 * 0.3) s


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
def test_checkpoint_size(gptlab, report, tmp_path, ema):
    """Against the file that a run saves; without the optimizer's state it would be a third."""
    same = ["model=gpt-nano", "model.n_embd=96", *["callbacks=[default,ema]"] * ema]
    gptlab("train", *TINY, *same, "hydra.run.dir=run")
    real = (tmp_path / "run/checkpoints/last.ckpt").stat().st_size
    (cells,) = report("data=python_docs", *same, memory=False)["checkpoint"].values()
    assert number(cells[0]) == pytest.approx(real, rel=0.015)


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_every_model_can_be_sized(report, model):
    found = report(f"model={model}", memory=False)
    assert "head (tied)" in found["parameters"] and "activations" not in found["memory"]


def test_sizes_of_the_fast_recipe(report):
    """Every parameter of the real model has a row: n-gram tables and the head are not forgotten, and Muon keeps one number
    for each of a block's, where AdamW keeps two."""
    found = report("experiment=shakespeare_char_speedrun_160", "vocab_size=65", memory=False)
    options = composed("train", "experiment=shakespeare_char_speedrun_160")[0]["model"]
    model = GPT(vocab_size=65, block_size=64, **{k: v for k, v in options.items() if k not in ("_target_", "compile")})
    matrices = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    total = sum(p.numel() for p in model.parameters())
    assert sum(sizing.count_parameters(model).values()) == number(found["parameters"]["total"][0]) == total
    (cells,) = found["checkpoint"].values()
    names = number(cells[0]) - 4 * (3 * total - matrices)  # and zip records; what Muon saves is 393,000 bytes
    assert 0 < names < 2000 * len([*model.parameters()])


def test_experiments_and_data(report):
    """What gptlab.train would train: block and vocabulary of the data, EMA's copy, the peak that is given."""
    found = report("experiment=addition", "callbacks=[problems,ema]", "flops_per_s=1e12", "mfu=1")
    assert found["parameters"]["position embedding"][0] == f"{6 * 128:,}"
    assert found["parameters"]["token embedding"][0] == f"{10 * 128:,}"
    memory = found["memory"]
    assert {"weights", "copies (EMA, DDP)", "activations", "peak"} <= memory.keys()
    assert found["time"].keys() == {"flops_per_s"}
    with pytest.raises(UserError, match="vocab_size=50257"):  # its data are not prepared
        report("experiment=gpt2_124m", "data.path=nowhere")


CUSTOM = """
import torch
from torch import nn

class Bigram(nn.Module):
    def __init__(self, vocab_size, block_size, width, fault=False):
        super().__init__()
        self.embed, self.out = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.fault = fault

    def forward(self, idx):
        if self.fault and idx.sum().item() > 0:
            raise RuntimeError
        return self.out(self.embed(idx))
"""


def test_custom_models(report, tmp_path, monkeypatch):
    """By child, with torch's count; a model whose path depends on values is refused in one line."""
    (tmp_path / "sized.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["~model", "+model._target_=sized.Bigram", "+model.width=4", "vocab_size=10", "data.block_size=8"]
    found = report(*given)
    assert {part: number(cells[0]) for part, cells in found["parameters"].items()} == {
        "embed": 40, "out": 50, "total": 90, "without embeddings": 90}  # fmt: skip
    assert found["FLOPs per token"]["all matrix products"][:2] == ["80", "240"]
    with pytest.raises(UserError, match=r"^model._target_=sized.Bigram: cannot run on tensors without data: .+$"):
        report(*given, "+model.fault=true")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": -1}, "tokens=-1: must be >= 1"),
        ({"mfu": 40}, "mfu=40: must be <= 1"),
        ({"tokenz": 3}, "unknown key tokenz; did you mean tokens?"),
        ({"model.n_head": 5}, "model.n_embd=768 must be divisible by model.n_head=5"),
        ({"model.n_layers": 3}, "unknown key model.n_layers; did you mean model.n_layer?"),
        ({"data.block_size": None}, "data.block_size=null: must be an integer"),
    ],
)
def test_wrong_settings_are_one_line(changes, said):
    assert errors("sizing", changes=changes) == [said]


@pytest.mark.slow
def test_the_program_runs_and_imports_no_lightning():
    """It would double the time of an answer that needs none of it."""
    program = "import sys; sys.argv = ['sizing', 'model.n_layer=1', 'data.block_size=8', 'vocab_size=9']\nfrom gptlab import cli, sizing; cli.main(sizing.size, 'sizing')"
    assert "lightning" not in modules_after(program)
