"""The model against an independent reference, GPT-2's numbers, and what it must refuse."""

import math

import pytest
import torch
import yaml
from composed import composed
from torch.nn import functional as F

from gptlab.config import CONF
from gptlab.model import GPT, Rotary


def small(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(**{"vocab_size": 11, "block_size": 7, "n_layer": 2, "n_head": 3, "n_embd": 12, "bias": True, **changes})


def reference_loss(
    weights: dict[str, torch.Tensor], ids: torch.Tensor, n_layer: int, n_head: int, gelu_is: str
) -> torch.Tensor:
    """GPT-2 position by position and head by head in float64, straight from the definition: no batches, no masks (a
    position only ever touches those before it), no fused anything."""

    def norm(x, name):
        centred = x - x.sum() / len(x)
        scale = torch.sqrt((centred * centred).sum() / len(x) + 1e-5)
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def gelu(x):
        if gelu_is == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    size = wte.shape[1] // n_head
    losses = []
    for row in ids:
        stream = [wte[token] + wpe[t] for t, token in enumerate(row[:-1])]
        for layer in range(n_layer):
            name = f"transformer.h.{layer}"
            qkv = [linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").view(3, n_head, size) for x in stream]
            for t in range(len(stream)):
                heads = []
                for h in range(n_head):
                    scores = torch.stack([qkv[t][0, h] @ qkv[s][1, h] / math.sqrt(size) for s in range(t + 1)])
                    shares = torch.exp(scores) / torch.exp(scores).sum()
                    heads.append(sum(shares[s] * qkv[s][2, h] for s in range(t + 1)))
                stream[t] = stream[t] + linear(torch.cat(heads), f"{name}.attn.c_proj")
            for t in range(len(stream)):
                hidden = gelu(linear(norm(stream[t], f"{name}.ln_2"), f"{name}.mlp.c_fc"))
                stream[t] = stream[t] + linear(hidden, f"{name}.mlp.c_proj")
        for t, x in enumerate(stream):
            logits = wte @ norm(x, "transformer.ln_f")
            losses.append(torch.log(torch.exp(logits).sum()) - logits[row[t + 1]])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_loss_and_gradients_equal_the_reference(gelu):
    """Any slip in attention, masking, norms, tying or activation moves the loss or some gradient far beyond 1e-9."""
    model = small(gelu=gelu).double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial zeros and ones, so that every term counts
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(0, 11, (2, 8))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_loss(weights, ids, n_layer=2, n_head=3, gelu_is=gelu)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-9, rtol=1e-7, msg=name)


def test_causality():
    """Changing a token must leave every earlier position's logits bitwise alone and change its own."""
    model = small(block_size=16).eval()
    ids = torch.randint(0, 11, (3, 16))
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all()


@pytest.mark.parametrize(("preset", "parameters"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                                    ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])  # fmt: skip
def test_gpt2_parameter_counts(preset, parameters):
    """Those of the published weights: a forgotten bias, norm or projection, or an untied head, would show."""
    sizes = {k: v for k, v in yaml.safe_load((CONF / f"model/{preset}.yaml").read_text()).items() if k != "defaults"}
    with torch.device("meta"):
        model = GPT(vocab_size=50257, block_size=1024, **sizes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initialisation_is_gpt2s():
    model = GPT(vocab_size=500, block_size=200, n_layer=6, n_head=4, n_embd=128, bias=True)
    for name, parameter in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 0).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 6) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < expected / 10, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_padded_vocabulary_takes_no_part():
    """The padding adds rows, but the loss, its gradient and the probabilities are those of the model without it."""
    plain, padded = small(), small(vocab_multiple=8)
    assert padded.transformer.wte.weight.shape[0] == 16
    padded.load_state_dict(
        {k: torch.cat((v, torch.full((5, 12), 9.0))) if v.shape[0] == 11 else v for k, v in plain.state_dict().items()}
    )
    ids = torch.randint(0, 11, (2, 8))
    losses = []
    for model in (plain, padded):
        logits = model(ids[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    assert (padded(ids[:, :-1]).softmax(-1)[..., 11:] == 0).all()
    gradient = padded.transformer.wte.weight.grad
    torch.testing.assert_close(gradient[:11], plain.transformer.wte.weight.grad)
    assert (gradient[11:] == 0).all()


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    ids = torch.randint(0, 11, (2, 7))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def loss_and_gradients(model: GPT) -> list[torch.Tensor]:
    torch.manual_seed(1)  # of dropout
    ids = torch.randint(0, 11, (4, 8))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return [loss, *(parameter.grad for parameter in model.parameters())]


def bytes_kept(model: GPT) -> int:
    """What a forward pass keeps for the backward pass, besides the weights; each storage counts once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(4, 7, dtype=torch.int64))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_computes_the_same(dropout):
    """Bitwise. Dropout drawn anew when a block is computed again would give other gradients."""
    ours, plain = (
        loss_and_gradients(small(dropout=dropout, activation_checkpointing=on).train()) for on in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_activation_checkpointing_keeps_one_tensor_per_block():
    """Four more blocks cost their inputs (4, 7, 12) in 32 bits, to the byte; without it, or in eval mode, more than ten
    times that."""
    inputs = 4 * 4 * 7 * 12 * 4
    for on, training in ((True, True), (False, True), (True, False)):
        few, many = (bytes_kept(small(n_layer=n, activation_checkpointing=on).train(training)) for n in (2, 6))
        assert many - few == inputs if on and training else many - few > 10 * inputs


@pytest.mark.parametrize(
    "changes", [{"n_embd": 13}, {"n_head": 0}, {"n_layer": 0}, {"vocab_size": 0}, {"dropout": 1.5}]
)
def test_sizes_that_cannot_be_built(changes):
    """From plain Python; a config is checked before it comes here."""
    with pytest.raises(ValueError, match=r"must be|has to be"):
        small(**changes)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        (torch.zeros(1, 8, dtype=torch.int64), ValueError, "8 tokens is longer than block_size=7"),
        (torch.full((1, 7), 11), IndexError, "out of range"),
    ],
)
def test_bad_inputs_raise(ids, error, text):
    """None of them may give a result, whether we or torch refuse it."""
    with pytest.raises(error, match=text):
        small()(ids)


@pytest.mark.parametrize("wrong", [{"position": "rope"}, {"position": "rotary", "n_head": 4}])
def test_positions_that_there_are_not(wrong):
    """Not silently learned ones, and no rotation of half a pair: 12 channels, 3 per head."""
    with pytest.raises(ValueError, match="position="):
        small(**wrong)


def test_flops_per_token():
    """12 L C T for attention on top of 6 for every weight of a matrix: here by hand for one layer."""
    model = GPT(vocab_size=10, block_size=8, n_layer=1, n_head=1, n_embd=4)
    matrices = 10 * 4 + (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 3 * 4
    assert model.flops_per_token() == 6 * matrices + 12 * 1 * 4 * 8


FAST = {"position": "rotary", "tie_weights": False, "ngrams": [2, 3, 5], "ngram_rows": 50}


def fast_gpt(**changes):
    """With n-gram tables, which start at zero, that matter."""
    torch.manual_seed(0)
    model = GPT(
        **{"vocab_size": 11, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16, **FAST, **changes}
    ).eval()
    for table in model.transformer.ngrams.tables if "ngrams" in model.transformer else ():
        torch.nn.init.normal_(table.weight)
    return model


@pytest.mark.parametrize("preset", ["", "_plain", "_160", "_154"])
def test_no_preset_of_the_speedrun_sees_a_later_token(preset):
    """The very model: another token changes the logits at its position and after it, none before."""
    node = composed("train", f"experiment=shakespeare_char_speedrun{preset}")[0]["model"]
    options = {key: value for key, value in node.items() if key not in ("_target_", "compile")}
    model, ids = fast_gpt(**options, vocab_size=65, block_size=64), torch.randint(65, (1, 64))
    before = model(ids)
    for position in range(64):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 65
        different = (model(changed) != before).any(dim=-1)[0]
        assert not different[:position].any() and different[position:].all()


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_a_cache_changes_no_logits(prompt):
    """n-grams reach back over what was cached, and rotary positions continue: token by token as all at once."""
    model, ids = fast_gpt(), torch.randint(11, (3, 12))
    cache = model.new_cache(3)
    logits = [model(ids[:, :prompt], cache), *(model(ids[:, i : i + 1], cache) for i in range(prompt, 12))]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids)[:, prompt - 1 :])


def test_ngram_rows_are_the_last_tokens():
    """Against a dictionary: equal n-grams have equal rows; where the table is large enough, others have others, and one
    before the text counts as a token of its own."""
    ngrams = fast_gpt(ngrams=[3], ngram_rows=12**3).transformer.ngrams
    (table,) = ngrams.tables
    assert table.weight.shape == (12**3, 16)
    ids, rows = torch.randint(11, (4, 12)), {}
    vectors = ngrams(ids, None)
    for row, out in zip(ids.tolist(), vectors, strict=True):
        for i, vector in enumerate(out):
            key = tuple(([None, None, *row])[i : i + 3])
            assert torch.equal(rows.setdefault(key, vector), vector)
    assert len({tuple(vector.tolist()) for vector in rows.values()}) == len(rows)
    hashed = fast_gpt(vocab_size=50_257, ngrams=[2, 8], ngram_rows=1000).transformer.ngrams
    used = [table.weight.grad.any(dim=1).sum() for table in hashed.tables
            if hashed(torch.randint(50_257, (100, 12)), None).sum().backward() is None]  # fmt: skip
    assert all(count > 600 for count in used)  # 1,200 n-grams: 699 rows if the hash spreads them evenly


def test_ngram_dropout_leaves_out_whole_vectors_in_training():
    ngrams = fast_gpt(ngrams=[3], ngram_dropout=0.25).transformer.ngrams
    ids = torch.randint(11, (400, 12))
    whole, dropped = ngrams(ids, None), ngrams.train()(ids, None)
    kept = dropped.any(dim=2)
    assert 0.7 < kept.float().mean() < 0.8  # 4,800 vectors: 8 standard deviations
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)  # so that the mean stays


def test_rotary_products_depend_on_the_distance():
    """A shift of all positions leaves the scores as they are; without rotation they would not depend on positions at all."""
    rotary = Rotary(8, 32)
    q, k = torch.randn(2, 1, 1, 8, 8)

    def scores(start):
        return rotary(q, start) @ rotary(k, start).mT

    torch.testing.assert_close(scores(0), scores(20), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores(0), q @ k.mT)


def test_an_untied_head_and_tables_count_once():
    """flops_per_token: six for each weight of a matrix product; tables that are looked up cost nothing."""
    model = fast_gpt()
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if ".h." in name or "lm_head" in name or "ln_f" in name
    )
    assert model.flops_per_token() == 6 * matrices + 12 * 2 * 16 * 12
    assert model.lm_head.weight is not model.transformer.wte.weight
