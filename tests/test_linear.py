"""Packed weights. Where torch lacks its private operators, or works with fake tensors, all goes on without them."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gptlab import linear
from gptlab.generate import Sampler, generate
from gptlab.model import GPT


@pytest.fixture(autouse=True)
def amd(monkeypatch):
    """As on a CPU on which packing pays."""
    monkeypatch.setattr(linear, "is_intel", lambda: False)


def gpt(**changes):
    torch.manual_seed(0)
    model = GPT(**{"vocab_size": 300, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 256} | changes).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.1)
    return model


def test_the_operators_are_there():
    """They are private: this is how their going would be noticed, and that the pinned torch has what is fast."""
    assert linear.can_pack()


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_layer(rows, bias):
    layer, x = nn.Linear(256, 512, bias=bias), torch.randn(rows, 1, 256)
    packed = linear.PackedLinear(layer.weight, layer.bias, torch.float32, 8)
    torch.testing.assert_close(packed(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("multiple", "bias"), [(1, True), (64, False)])
def test_a_packed_model_has_the_same_logits_and_text(multiple, bias):
    model = gpt(vocab_multiple=multiple, bias=bias)
    packed = linear.pack(model)
    assert any(isinstance(module, linear.PackedLinear) for module in packed.modules())
    ids = torch.randint(300, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids)[..., :300], model(ids)[..., :300], atol=1e-5, rtol=1e-5)
        cache, plain = packed.new_cache(2), model.new_cache(2)
        for new in (ids[:, :5], ids[:, 5:6]):
            torch.testing.assert_close(
                packed(new, cache)[..., :300], model(new, plain)[..., :300], atol=1e-5, rtol=1e-5
            )
    prompts, settings = [[1, 2, 3], [4]], {"sampler": Sampler(0.8, 50)}
    assert [*generate(packed, prompts, 40, **settings)] == [*generate(model, prompts, 40, **settings)]


def test_packing_leaves_the_model_alone_and_shares_the_rest():
    model = gpt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = linear.pack(model)
    assert packed is not model and packed.transformer.wte.weight is model.transformer.wte.weight
    assert not any(isinstance(module, linear.PackedLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()  # it can still be trained


def test_small_weights_stay():
    """Below 256 x 256 the call costs more than it saves."""
    packed = linear.pack(gpt(n_embd=128, vocab_size=600))
    kinds = {name: type(module) for name, module in packed.named_modules() if "c_" in name or name == "lm_head"}
    assert kinds["lm_head"] is linear.PackedLinear  # 600 x 128
    assert kinds["transformer.h.0.attn.c_proj"] is nn.Linear  # 128 x 128


def test_without_the_operators_the_model_is_used_as_it_is(monkeypatch):
    model = gpt()
    monkeypatch.setattr(linear, "OPERATORS", ("_no_such_operator",))
    assert not linear.can_pack() and linear.pack(model) is model


@pytest.mark.parametrize(
    ("intel", "dtype", "rows", "shape", "expected"),
    [
        (False, torch.float32, 1, (256, 256), True),
        (False, torch.float32, 8, (256, 255), False),
        (True, torch.float32, 1, (4096, 1024), False),
        (True, torch.float32, 8, (4096, 1024), True),
        (True, torch.float32, 8, (1536, 384), False),
        (True, torch.bfloat16, 1, (256, 256), True),
    ],
)
def test_where_packing_pays(monkeypatch, intel, dtype, rows, shape, expected):
    monkeypatch.setattr(linear, "is_intel", lambda: intel)
    assert linear.pays(torch.empty(shape), dtype, rows) is expected


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: FlopCounterMode(display=False)])
def test_modes_that_look_at_operators_see_plain_ones(mode):
    with mode():
        model = gpt()
        assert linear.pack(model) is model


def test_a_packed_model_counts_and_compiles_as_the_plain_one():
    model, ids = gpt(vocab_multiple=1), torch.randint(300, (2, 8))
    packed, counts = linear.pack(model), []
    for counted in (model, packed):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            counted(ids)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(packed, backend="aot_eager")(ids), model(ids), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_used_as_it_is():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(256, 256)

    custom, double = Custom(), gpt().double()
    assert linear.pack(custom) is custom and linear.pack(double) is double


@pytest.mark.skipif(not linear.fast_bf16(), reason="this CPU does not multiply bfloat16")
def test_bf16_weights_are_close_and_half_as_large():
    """Activations stay in float32. Nothing is promised about the text."""
    model = gpt()
    packed, ids = linear.pack(model, torch.bfloat16), torch.randint(300, (2, 16))
    with torch.no_grad():
        ours, exact = packed(ids), model(ids)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 0.02 * exact.abs().mean()
