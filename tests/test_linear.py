"""oneDNN's linear layers, trained and packed. Where torch lacks its private operators, or works with fake tensors, all goes on
without them."""

import copy
import time

import pytest
import torch
from composed import composed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gptlab import config, linear, machine, train
from gptlab.errors import UserError
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


# --- training


def gradients(layer, x, grad):
    """Output, and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


INPUTS = {
    "one row more than few": lambda: torch.randn(linear.FEW_ROWS + 1, 24),
    "a batch": lambda: torch.randn(2, 3, 5, 24),
    "transposed": lambda: torch.randn(24, 7, 3).transpose(0, 2),
    "every second channel": lambda: torch.randn(4, 8, 48)[..., ::2],
    "the same row": lambda: torch.randn(24).expand(4, 8, 24),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 17, 64])
@pytest.mark.parametrize("name", INPUTS)
def test_onednns_layer_has_the_outputs_and_gradients_of_float64(monkeypatch, name, outputs, bias):
    """Also for strides that its kernels would misread, and a gradient that is one number everywhere, as that of a sum."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, outputs, bias=bias), INPUTS[name]()
    expected, grad = copy.deepcopy(layer).double(), torch.randn(())
    linear.use_onednn(layer)
    calls = count_products(monkeypatch)
    for ours, exact in zip(
        gradients(layer, x, grad.expand(*x.shape[:-1], outputs)),
        gradients(expected, x.double(), grad.double().expand(*x.shape[:-1], outputs)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact.float(), atol=1e-5, rtol=1e-5)
    assert len(calls) == 3


def count_products(monkeypatch) -> list:
    calls, product = [], linear.product
    monkeypatch.setattr(linear, "product", lambda *tensors: calls.append(1) or product(*tensors))
    return calls


@pytest.mark.parametrize(("bias", "multiple"), [(False, 1), (True, 1), (True, 64)])
def test_a_model_trains_with_onednn_as_without(monkeypatch, bias, multiple):
    """Tied weights stay one, checkpoints fit either way, and each layer takes three products: one that was left out would be
    no faster."""
    plain, ids = gpt(n_embd=64, bias=bias, vocab_multiple=multiple), torch.randint(300, (2, 16))
    ours = copy.deepcopy(plain)
    linear.use_onednn(ours)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert list(ours.state_dict()) == list(plain.state_dict())
    calls = count_products(monkeypatch)
    losses = [model.train()(ids).logsumexp(-1).sum() for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    assert len(calls) == 3 * (4 * 2 + 1)
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-4 * p.grad.abs().max().item(), rtol=1e-4, msg=name)


@pytest.mark.parametrize(("input_grad", "weight_grad"), [(True, True), (False, True), (True, False), (False, False)])
def test_what_is_kept_for_the_backward_pass_is_what_torch_keeps(input_grad, weight_grad):
    """The memory estimate runs torch's own layers: a copy, or an input kept for a frozen weight, would be missing there."""
    kept = []
    for kind in (nn.Linear, linear.OneDNNLinear):
        layer, x = kind(16, 8), torch.randn(32, 16, requires_grad=input_grad)
        layer.requires_grad_(weight_grad)
        names = {x.data_ptr(): "input", layer.weight.data_ptr(): "weight"}
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, names=names: kept[-1].append(names[t.data_ptr()]), id):
            layer(x)
    assert sorted(kept[0]) == sorted(kept[1])


def test_where_onednn_cannot_help_the_layer_is_the_plain_one(monkeypatch):
    """bf16, other types, few rows, and all that looks at operators. (Packed weights and subclasses are not even touched.)"""
    layer, x = nn.Linear(32, 16), torch.randn(4, 8, 32)
    linear.use_onednn(layer)
    calls = count_products(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    copy.deepcopy(layer).double()(x.double())
    layer(x[0])
    layer(x[:0])
    layer(x[0, 0])
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * x.numel() * 16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    torch.compile(layer, backend="eager", fullgraph=True)(x).sum().backward()
    assert not calls
    layer(x)
    assert len(calls) == 1


def test_custom_layers_stay_what_they_are():
    class Noisy(nn.Linear):
        pass

    model = nn.Sequential(Noisy(4, 4), nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    kinds = [type(child) for child in model]
    linear.use_onednn(model)
    assert [type(child) for child in model] == [kinds[0], linear.OneDNNLinear, kinds[2]]


def test_a_model_trained_with_onednn_can_be_packed():
    model = gpt()
    linear.use_onednn(model)
    assert isinstance(linear.pack(model).lm_head, linear.PackedLinear)


# --- trainer.linear=auto


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty one, and a list of the answers that measurements are to give."""
    monkeypatch.setenv("GPTLAB_DATA", str(tmp_path / "data"))
    answers = []
    monkeypatch.setattr(machine, "measure_linear", lambda: answers.pop(0))
    return tmp_path / "data/linear.json", answers


def test_a_machine_is_measured_once(cache, monkeypatch, tmp_path):
    """Per model, features and version of torch: another machine that shares the home has its own answer."""
    file, answers = cache
    answers[:] = ["onednn", "torch", "torch"]
    assert [machine.fastest_linear() for _ in range(3)] == ["onednn"] * 3
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    for features in ("fma avx2", "fma avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"model name\t: AMD EPYC\nflags\t\t: {features}\n\nmodel name\t: AMD EPYC\n")
        assert [machine.fastest_linear() for _ in range(2)] == ["torch"] * 2
    monkeypatch.undo()
    assert not answers and file.read_text().count("AMD EPYC") >= 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"KEY": "magic"}', '{"KEY": ["torch"]}', "[" * 100_000, "\xff"]
)
def test_a_damaged_answer_is_measured_again(cache, content):
    file, answers = cache
    file.parent.mkdir()
    key = f"{machine.cpu_model()}, torch {torch.__version__}"
    file.write_text(content.replace("KEY", key), "latin-1")
    answers[:] = ["onednn"]
    assert [machine.fastest_linear() for _ in range(2)] == ["onednn"] * 2


def test_a_home_that_cannot_be_written_is_no_error(cache):
    file, answers = cache
    file.parent.write_text("a file in the place of the folder")
    answers[:] = ["onednn", "torch"]
    assert [machine.fastest_linear() for _ in range(2)] == ["onednn", "torch"]


def test_measuring_is_quick_and_leaves_threads_and_random_numbers_alone():
    """It is a part of a start, once. (CPU time: 0.2 s.)"""
    before = torch.get_rng_state(), torch.get_num_threads()
    began = time.process_time()
    assert machine.measure_linear() in machine.CHOICES
    assert time.process_time() - began < 1
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


@pytest.mark.parametrize(("factor", "answer"), [(0.5, "torch"), (1.0, "torch"), (1.14, "torch"), (1.16, "onednn")])
def test_onednn_must_be_clearly_faster(monkeypatch, factor, answer):
    """In the best of its tries: the others may have been disturbed."""
    disturbed = iter([9.0] * 2 + [1.0, 1.0, 5.0, 1.0] * 100)
    onednn = linear.OneDNNProduct.apply
    monkeypatch.setattr(linear.OneDNNProduct, "apply", onednn)
    monkeypatch.setattr(machine, "_seconds", lambda layer, *_: (1.0 if layer is onednn else factor) * next(disturbed))
    assert machine.measure_linear() == answer


def test_without_the_operators_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(linear, "OPERATORS", ("_no_such_operator",))
    monkeypatch.setattr(machine, "_seconds", None)
    assert machine.measure_linear() == "torch"


def resolved(monkeypatch, **changes):
    """cfg.trainer, on a CPU that is fastest with oneDNN."""
    monkeypatch.setattr(machine, "fastest_linear", lambda: "onednn")
    monkeypatch.setattr(train.cli, "_started", None)
    values, references = composed("train", "hardware=cpu")
    for key, value in changes.items():
        values = config.with_value(values, key.replace("__", "."), value)
    cfg = config.validate(values, "train", references)
    train.resolve_autos(cfg)
    return cfg.trainer


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "onednn"),
        ({"trainer__linear": "torch"}, "torch"),
        ({"trainer__precision": "bf16"}, "torch"),
        ({"model__compile": True}, "torch"),
        ({"trainer__devices": 2}, "torch"),
        ({"trainer__devices": 2, "trainer__linear": "onednn"}, "onednn"),
    ],
)
def test_auto_is_resolved_where_it_matters(monkeypatch, changes, answer):
    """The processes of a run might measure different answers; compiled graphs and bf16 have their own kernels."""
    monkeypatch.setattr(linear, "fast_bf16", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(train.shutil, "which", lambda name: name)
    assert resolved(monkeypatch, **changes).linear == answer


@pytest.mark.parametrize(("fast", "precision", "kind"), [(True, "bf16", "torch"), (False, "32", "onednn")])
def test_cpus_that_multiply_bf16_train_in_it(monkeypatch, fast, precision, kind):
    monkeypatch.setattr(linear, "fast_bf16", lambda: fast)
    t = resolved(monkeypatch)
    assert (t.precision, t.linear) == (precision, kind)
    assert resolved(monkeypatch, trainer__precision="32").precision == "32"


@pytest.mark.parametrize(("changes", "precision"), [({}, "fp16"), ({"optim__muon_lr": 0.02}, "32")])
def test_a_gpu_without_bf16(monkeypatch, changes, precision):
    """What auto chooses must be what the rules allow: Muon refuses fp16."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    assert resolved(monkeypatch, trainer__accelerator="gpu", **changes).precision == precision


def test_onednn_without_the_operators_is_refused(monkeypatch):
    """A run that was saved with it, resumed with another torch; trainer.linear=torch is a change that a resume may make."""
    monkeypatch.setattr(linear, "OPERATORS", ("_no_such_operator",))
    with pytest.raises(UserError, match=r"^trainer\.linear=onednn: .*use trainer\.linear=torch$"):
        resolved(monkeypatch, trainer__linear="onednn")


def test_runs_of_an_older_gptlab_keep_their_layers():
    values, references = composed("train")
    older = {**values, "trainer": {key: value for key, value in values["trainer"].items() if key != "linear"}}
    assert config.validate(older, "train", references).trainer.linear == "torch"
