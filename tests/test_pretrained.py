"""Weights in Hugging Face's format, without Hugging Face: there and back, into smaller models, and what is refused.
That transformers agrees is in test_export.py."""

import itertools
import random
import time
from typing import Any

import pytest
import torch
import yaml

from gptlab import pretrained
from gptlab.config import CONF
from gptlab.model import GPT
from gptlab.pretrained import (
    copy_weights,
    from_hf,
    hf_architecture,
    shapes_of,
    to_hf,
)

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8}
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


def gpt(**changes: Any) -> GPT:
    """A small GPT whose every parameter counts."""
    torch.manual_seed(1)
    model = GPT(**{"vocab_size": 11, "block_size": 6, "bias": True, **SIZES, **changes}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: GPT, length: int = 5) -> torch.Tensor:
    """Of all tokens but for padding, (2, length, 9)."""
    with torch.no_grad():
        return model(torch.arange(2 * length).view(2, length) % 9)[..., :9]


@pytest.mark.parametrize("bias, gelu, multiple", [*itertools.product([False, True], ["erf", "tanh"], [1, 8])])
def test_there_and_back(bias, gelu, multiple):
    """Padding is left out, and biases that are not there are zeros."""
    model = gpt(bias=bias, gelu=gelu, vocab_multiple=multiple)
    loaded = from_hf(*to_hf(model))
    assert loaded.model == {**SIZES, "bias": True, "gelu": gelu}
    assert (loaded.vocab_size, loaded.block_size) == (11, 6)
    again = gpt(bias=True, gelu=gelu, vocab_multiple=4)
    copy_weights(loaded.weights, again)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    ours = model.state_dict()
    rows = {WTE: 11, "lm_head.weight": 11}
    assert all(torch.equal(again.state_dict()[name][: rows.get(name)], ours[name][: rows.get(name)]) for name in ours)


def test_sizes_of_gpt2():
    for name, model in pretrained.GPT2.items():
        assert model.items() <= yaml.safe_load((CONF / f"model/{name}.yaml").read_text()).items()
    assert hf_architecture({"model_type": "gpt2"}) == (pretrained.GPT2["gpt2"], 50257, 1024)


@pytest.mark.parametrize("bias", [False, True])
def test_shapes_are_those_of_a_model(bias):
    expected = {name: weight.shape for name, weight in gpt(bias=bias).state_dict().items()}
    assert shapes_of({**SIZES, "bias": bias}, 11, 6) == expected


def test_what_files_may_hold():
    """The names of the bare model, buffers that older files have, the tied weight or not, other floating-point types."""
    architecture, weights = to_hf(gpt())
    expected = logits(gpt())
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")}
    files = [
        {name.removeprefix("transformer."): weight for name, weight in (weights | masks).items()},
        weights | masks | {"lm_head.weight": weights[WTE]},
        {name: weight.double() for name, weight in weights.items()},
    ]
    for file in files:
        model = gpt(vocab_size=9)
        copy_weights(from_hf(architecture, file).weights, model)
        assert torch.allclose(logits(model), expected, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        copy_weights(from_hf(architecture, {name: weight.to(dtype) for name, weight in weights.items()}).weights, model)
        assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
        assert torch.equal(model.transformer.wte.weight, weights[WTE][:9].to(dtype).float())


def test_aliases_of_keys():
    """`num_attention_heads` is not seen in any shape."""
    architecture, weights = to_hf(gpt())
    aliases = {"num_hidden_layers": 2, "hidden_size": 8, "max_position_embeddings": 6, "num_attention_heads": 4}
    del architecture["n_layer"], architecture["n_embd"], architecture["n_positions"]
    assert from_hf({**architecture, "n_head": 2, **aliases}, weights).model == {**SIZES, "n_head": 4, "bias": True, "gelu": "erf"}  # fmt: skip


REFUSED = [
    ({"model_type": "gpt_neo"}, "model_type='gpt_neo' must be gpt2"),
    ({"model_type": None}, "model_type=None must be gpt2"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 must be 1e-05"),
    ({"n_inner": 31}, "n_inner=31 must be None or 32"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False must be True"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True must be False"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings=False must be True"),
    ({"add_cross_attention": True}, "add_cross_attention=True must be False"),
    ({"activation_function": "relu"}, "activation_function='relu' must be gelu or gelu_new or gelu_pytorch_tanh"),
    ({"activation_function": ["gelu"]}, "activation_function=['gelu'] must be"),
    ({"n_head": 3}, "n_embd=8 must be divisible by n_head=3"),
    ({"n_head": True}, "n_head=True must be an integer from 1"),
    ({"n_layer": 0}, "n_layer=0 must be an integer from 1"),
    ({"n_embd": 8.0}, "n_embd=8.0 must be an integer from 1"),
    ({"vocab_size": 2**24 + 1}, "vocab_size=16777217 must be an integer from 1 to 16777216"),
    ({"n_positions": "6"}, "n_positions='6' must be an integer from 1"),
    ({"num_hidden_layers": None}, "n_layer=None must be an integer from 1"),
]


@pytest.mark.parametrize("changes, text", REFUSED)
def test_an_architecture_that_gpt_is_not(changes, text):
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        hf_architecture({**to_hf(gpt())[0], **changes})
    assert text in str(error.value) and ";" not in str(error.value)


def test_all_that_is_wrong_is_named_at_once():
    everything = {key: value for changes, _ in REFUSED[:9] for key, value in changes.items()}
    with pytest.raises(ValueError) as error:
        hf_architecture({**to_hf(gpt())[0], **everything})
    assert all(f"{key}=" in str(error.value) for key in everything)
    for value in (None, [], "gpt2"):
        with pytest.raises(ValueError, match=r"config\.json must be an object"):
            hf_architecture(value)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda w: w.pop("transformer.h.1.ln_2.bias"), "missing: transformer.h.1.ln_2.bias"),
        (lambda w: w.update({"score.weight": torch.ones(2, 8)}), "unknown: score.weight"),
        (lambda w: w.update({"wte.weight": torch.ones(11, 8)}), "unknown: wte.weight"),
        (lambda w: w.update({WTE: torch.ones(12, 8)}), f"{WTE} (12, 8) torch.float32, not (11, 8)"),
        (lambda w: w.update({WPE: torch.ones(6, 8).byte()}), f"{WPE} (6, 8) torch.uint8, not (6, 8)"),
        (lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(1, 8, 32)}), "c_fc.weight (1, 8, 32)"),
        (lambda w: w.update({"transformer.h.0.attn.c_attn.weight": torch.ones(24, 8)}), "c_attn.weight (8, 24)"),
        (lambda w: [w.pop(name) for name in [*w] if ".h.1." in name], "and 9 more"),
        (lambda w: w.clear(), "n_layer=2 must not be more than the 0 weights"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(change, text):
    architecture, weights = to_hf(gpt())
    change(weights)
    with pytest.raises(ValueError) as error:
        from_hf(architecture, weights)
    assert text in str(error.value)


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_a_huge_config_takes_neither_memory_nor_time(key):
    """n_embd=2**24 alone would be 4 PiB in each block."""
    architecture, weights = to_hf(gpt())
    started = time.process_time()
    with pytest.raises(ValueError):
        from_hf({**architecture, key: 2**24}, weights)
    assert time.process_time() - started < 1


def test_into_a_smaller_model():
    """Fewer positions, and a vocabulary without nanoGPT's padding or with other padding, which stays as it is."""
    padded = gpt(vocab_size=16)
    for multiple in (1, 8, 64):
        model = gpt(vocab_size=9, block_size=4, vocab_multiple=multiple)
        padding = model.transformer.wte.weight[9:].clone()
        copy_weights(padded.state_dict(), model)
        assert torch.allclose(logits(model, 4), logits(padded, 4), atol=1e-6)
        assert torch.equal(model.transformer.wte.weight[9:], padding)
        assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("changes", [{"vocab_size": 12}, {"block_size": 7}, {"n_embd": 4}, {"n_layer": 1}, {"n_layer": 3}, {"bias": False}])  # fmt: skip
def test_into_a_model_of_another_shape(changes):
    model = gpt(**changes)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="do not fit the model; "):
        copy_weights({name: weight + 1 for name, weight in gpt().state_dict().items()}, model)
    assert all(map(torch.equal, before, model.parameters()))


VALUES = [None, True, False, -1, 0, 1, 2, 3, 4, 8, 16, 1.5, 1e-5, float("nan"), 2**24, 2**31, 2**70, "", "gelu", "gpt2", [], [[8]], {}, {"n": 8}]  # fmt: skip
ARCHITECTURE, WEIGHTS = to_hf(gpt())
SHAPES = {name: weight.to("meta") for name, weight in WEIGHTS.items()}


def mutate(rng: random.Random, architecture: dict[str, Any], weights: dict[str, Any]) -> None:
    """One change of the config or of a name, shape or type of the weights, in place."""
    name, key = rng.choice([*weights]), rng.choice([*architecture, "n_inner", "num_attention_heads", "hidden_size"])
    kind = rng.randrange(8)
    if kind < 4:
        architecture[key] = rng.choice(VALUES)
    elif kind == 4:
        architecture.pop(key, None)
    elif kind == 5:
        weights[rng.choice([name + "x", "h.2." + name, name.removeprefix("transformer."), name[::-1]])] = weights.pop(
            name
        )
    elif kind == 6:
        shape = [rng.choice([0, 1, 2, 6, 8, 11, 24, 2**20]) for _ in range(rng.randrange(4))]
        weights[name] = torch.empty(shape or weights[name].shape[::-1], device="meta")
    else:
        weights[name] = weights[name].to(rng.choice([torch.int8, torch.float16, torch.bool, torch.complex64]))


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_configs_and_weights(count):
    """A GPT of these weights, or one ValueError, at once."""
    rng, refused = random.Random(count), 0
    for _ in range(count):
        architecture, weights = ARCHITECTURE.copy(), SHAPES.copy()
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate(rng, architecture, weights)
        started = time.process_time()
        try:
            loaded = from_hf(architecture, weights)
        except ValueError as error:
            refused += 1
            assert 20 < len(str(error)) < 2500 and str(error).isprintable()
        else:
            shapes = shapes_of(loaded.model, loaded.vocab_size, loaded.block_size)
            assert shapes == {name: weight.shape for name, weight in loaded.weights.items()}
        assert time.process_time() - started < 1
    assert 0.3 < refused / count < 0.95
