"""The chunked loss against cross-entropy of all logits by plain autograd: values, gradients, precision, memory."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptlab import linear, loss
from gptlab.memory import LiveBytes, estimate_step
from gptlab.model import GPT, nats

N, C, V, ROWS = 19, 8, 30, 5  # the last chunk is a shorter one


def inputs(padded: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((N, C), (V, C)))
    targets = torch.randint(0, V - 3, (N,), generator=generator)
    targets[[0, 7, 8, 18]] = -100
    return x, weight, torch.tensor([0.0] * (V - 3) + [-math.inf] * 3) if padded else None, targets


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return loss.of_logits(logits if bias is None else logits + bias, targets)


def in_chunks(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int = ROWS) -> Tensor:
    return loss.summed_nats(x, SimpleNamespace(weight=weight, bias=bias), targets, rows)


def gradients(nats: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [nats.detach(), *torch.autograd.grad(0.3 * nats, tensors)]


@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(padded):
    """Seen: a target that does not count, or a padded row, that gets a gradient; a last chunk that is left out."""
    x, weight, bias, targets = inputs(padded)
    expected = gradients(plain(x, weight, bias, targets), x, weight)
    ours = gradients(in_chunks(x, weight, bias, targets), x, weight)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (ours[1][targets == -100] == 0).all()


def test_mixed_precision():
    """Autocast does not look into an autograd function: products must be in bf16, the softmax and the sum of the weight's
    gradient over the chunks in fp32. Summed in bf16, the gradient would err by more than the plain one does."""
    x, weight, bias, targets = inputs(padded=True)
    exact = gradients(plain(x, weight, bias, targets), x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = gradients(plain(x, weight, bias, targets), x, weight)
        ours = gradients(in_chunks(x, weight, bias, targets, 1), x, weight)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    for a, b, c in zip(ours, rounded, exact, strict=True):
        assert (a - c).norm() <= 1.2 * (b - c).norm()
    assert not torch.allclose(ours[0], exact[0], rtol=1e-5)  # else autocast was ignored


def test_a_non_finite_loss_makes_gradients_non_finite():
    """GPTModule multiplies such a loss by nan and looks at the gradients alone; in a chunk, one position is enough."""
    x, weight, _, targets = inputs()
    with torch.no_grad():
        x[12] = math.inf
    total = in_chunks(x, weight, None, targets)
    assert not total.isfinite()
    for gradient in torch.autograd.grad(total * math.nan, (x, weight)):
        assert gradient.isnan().all()


def test_without_gradients_none_are_computed():
    """A validation: neither the time nor the memory of a gradient; the same loss."""
    x, weight, bias, targets = inputs()
    expected = in_chunks(x, weight, bias, targets)
    with torch.no_grad(), LiveBytes() as live:
        assert in_chunks(x, weight, bias, targets) == expected
    assert live.peak < expected.grad_fn.saved_tensors[1].nbytes + 2 * 4 * ROWS * V + 4 * N * C + 1000


def test_a_second_backward_pass_is_an_error():
    """The first one scales the gradients in place; scaled again, they would be wrong."""
    x, weight, bias, targets = inputs()
    total = in_chunks(x, weight, bias, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_head_by_onednn(monkeypatch):
    """Logits and the gradient of x are its products, in each of four chunks; torch adds up the weight's in place."""
    x, weight, bias, targets = inputs(padded=True)
    expected = gradients(plain(x, weight, bias, targets), x, weight)
    head, calls, product = linear.OneDNNLinear(C, V, bias=False), [], linear.product
    head.weight = torch.nn.Parameter(weight.detach())
    del head.bias
    head.register_buffer("bias", bias)
    monkeypatch.setattr(linear, "product", lambda *tensors: calls.append(1) or product(*tensors))
    ours = gradients(loss.summed_nats(x, head, targets, ROWS), x, head.weight)
    assert len(calls) == 2 * 4
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 64 * 10)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    size = {"vocab_size": 60, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_multiple": 64}
    return GPT(**size | changes)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_gpt_trains_alike(small_chunks, masked, activation_checkpointing):
    """The head's weight is also the embedding's: its two gradients must add up."""
    model, reference = make_model(activation_checkpointing=activation_checkpointing), make_model()
    ids = torch.randint(0, 60, (3, 17))
    mask = torch.rand(3, 17) < 0.5 if masked else None
    total = nats(model, ids, mask)
    assert "LinearCrossEntropy" in type(total.grad_fn).__name__
    targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    expected = loss.of_logits(reference(ids[:, :-1]), targets)
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_small_vocabularies_take_the_plain_path_to_the_bit():
    model, ids = make_model(), torch.randint(0, 60, (3, 17))
    assert torch.equal(nats(model, ids), loss.of_logits(model(ids[:, :-1]), ids[:, 1:]))


def test_a_subclass_with_a_forward_of_its_own_takes_no_targets(small_chunks):
    class Custom(GPT):
        def forward(self, idx):
            return super().forward(idx) * 2

    model, ids = Custom(vocab_size=60, block_size=16, n_layer=1, n_head=2, n_embd=16), torch.randint(0, 60, (3, 17))
    assert torch.equal(nats(model, ids), loss.of_logits(model(ids[:, :-1]), ids[:, 1:]))


@pytest.mark.filterwarnings("error")
def test_compiled_models_leave_their_graph_without_a_warning(small_chunks):
    torch.compiler.reset()
    model, ids = make_model(), torch.randint(0, 60, (3, 17))
    expected = nats(model, ids)
    model.compile(backend="eager")
    total = nats(model, ids)
    torch.testing.assert_close(total, expected)
    total.backward()
    with torch.no_grad():
        torch.testing.assert_close(nats(model, ids), expected)


def test_memory_does_not_grow_by_all_logits():
    """Doubling the sequences adds 103 MB of logits in fp32, several times over in plain autograd."""
    size = {"vocab_size": 50257, "block_size": 512, "n_layer": 1, "n_head": 2, "n_embd": 16}
    one, two = (
        estimate_step(lambda: GPT(**size), block_size=512, sequences=n, micro_batch_size=n, precision="32", device_type="cpu")
        for n in (1, 2)
    )  # fmt: skip
    assert two.peak - one.peak < 4 * 512 * 50257 / 10
