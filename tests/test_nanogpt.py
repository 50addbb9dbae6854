"""nanoGPT's files: its own model gives the same logits, and no file, however wrong, does more than raise a UserError.

`GPTLAB_TEST_NANOGPT` names a clone of nanoGPT; without it, files of the same structure are made here.
"""

import copy
import importlib.util
import io
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from gptlab import nanogpt
from gptlab.errors import MissingFileError, UserError
from gptlab.model import GPT

ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": False, "vocab_size": 11, "dropout": 0.1}
CHARS = "\n !ABCab\u00e9\u4e00\U0001f600"


def their_model(arguments: dict) -> torch.nn.Module:
    """nanoGPT's GPT, from its own source."""
    path = Path(os.environ.get("GPTLAB_TEST_NANOGPT", "")) / "model.py"
    if not path.is_file():
        pytest.skip("GPTLAB_TEST_NANOGPT does not name a clone of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.GPT(module.GPTConfig(**arguments))


def our_model(arguments: dict) -> torch.nn.Module:
    return GPT(**arguments)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and LayerNorms, too, which begin as 0 and 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    return model.eval()


def checkpoint(model: torch.nn.Module, arguments: dict) -> dict:
    """What nanoGPT's train.py saves."""
    return {"model": model.state_dict(), "optimizer": {}, "model_args": arguments, "iter_num": 5,
            "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"}}  # fmt: skip


def saved(value: dict) -> dict:
    torch.save(value, stream := io.BytesIO())
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=True)


def valid() -> dict:
    return checkpoint(randomize(our_model(ARGUMENTS)), dict(ARGUMENTS))


@pytest.mark.parametrize("make", [our_model, their_model])
@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"vocab_size": 50304, "bias": True}], ids=str)
def test_the_logits_are_those_of_the_saved_model(make, changes):
    arguments = ARGUMENTS | changes
    model = randomize(make(arguments))
    pretrained = nanogpt.from_checkpoint(saved(checkpoint(model, arguments)))
    sizes = {"vocab_size": pretrained.vocab_size, "block_size": pretrained.block_size}
    ours = GPT(**sizes, **pretrained.model).eval()
    ours.load_state_dict(pretrained.weights)
    idx = torch.randint(arguments["vocab_size"], (3, 8))
    with torch.no_grad():
        theirs = model(idx) if make is our_model else model(idx, targets=idx)[0]  # targets: at every position
        torch.testing.assert_close(ours(idx), theirs, atol=1e-5, rtol=0)
    assert pretrained.model["gelu"] == "erf" and pretrained.weights["lm_head.weight"] is pretrained.weights["transformer.wte.weight"]  # fmt: skip


def test_compiled_models_masks_and_files_without_bias():
    plain = nanogpt.from_checkpoint(content := valid())
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    content["model"] = {f"_orig_mod.{name}": weight for name, weight in (content["model"] | masks).items()}
    compiled = nanogpt.from_checkpoint(content)
    assert compiled.weights.keys() == plain.weights.keys() and compiled.model == plain.model
    assert all(torch.equal(compiled.weights[name], weight) for name, weight in plain.weights.items())

    arguments = {key: value for key, value in ARGUMENTS.items() if key not in ("bias", "dropout")}
    assert nanogpt.from_checkpoint(checkpoint(GPT(**arguments, bias=True), arguments)).model["bias"] is True


def test_is_nanogpt():
    assert nanogpt.is_nanogpt(valid())
    assert not nanogpt.is_nanogpt({"model": {}}) and not nanogpt.is_nanogpt({"state_dict": {}, "config": {}})


def arguments_changed(**changes):
    return lambda content: content["model_args"].update(changes)


def weights_changed(**changes):
    return lambda content: content["model"].update({name.replace("__", "."): w for name, w in changes.items()})


def share_memory(content: dict) -> None:
    shared = torch.zeros(64, 16)
    for name, weight in content["model"].items():
        if name.endswith("mlp.c_fc.weight"):
            content["model"][name] = shared if weight.shape == shared.shape else weight


WRONG = {
    "dicts": lambda content: content.update(model=[1]),
    "names as keys": lambda content: content["model"].update({3: torch.zeros(1)}),
    "n_layer=None must be an integer": lambda content: content["model_args"].pop("n_layer"),
    "n_head=2.0 must be an integer": arguments_changed(n_head=2.0),
    "n_embd=True must be an integer": arguments_changed(n_embd=True),
    "vocab_size=-1 must be an integer from 1": arguments_changed(vocab_size=-1),
    "n_layer=10{15,}[.]{3}0+ must be": arguments_changed(n_layer=10**100),
    "bias=1 must be True or False": arguments_changed(bias=1),
    "unknown model_args 'rotary'": arguments_changed(rotary=True),
    "divisible": arguments_changed(n_head=3),
    r"wte.weight is \(11, 16\); model_args imply \(12, 16\)": arguments_changed(vocab_size=12),
    r"wpe.weight is \(8, 16\); model_args imply \(16777216, 16\)": arguments_changed(block_size=2**24),
    "no weights 'transformer.h.10.attn.c_attn.weight', .* and 5985 more": arguments_changed(n_layer=1000),
    "no weights .*attn.c_attn.bias": arguments_changed(bias=True),
    "no weights 'transformer.ln_f.weight'": lambda content: content["model"].pop("transformer.ln_f.weight"),
    "unknown weights 'lm_head.bias'": weights_changed(lm_head__bias=torch.zeros(11)),
    "'lm_head.weight' must be dense": weights_changed(lm_head__weight=torch.zeros(11, 16).to_sparse()),
    "'transformer.wpe.weight' must be dense": weights_changed(transformer__wpe__weight=torch.zeros(8, 16).int()),
    "'transformer.wte.weight' must be dense": weights_changed(transformer__wte__weight=torch.zeros(11, 16, device="meta")),
    "'x' must be dense": weights_changed(x="y"),
    "tied": weights_changed(lm_head__weight=torch.zeros(11, 16)),
    "share memory": share_memory,
    "weights share memory": weights_changed(transformer__wpe__weight=torch.zeros(1).expand(8, 16)),
}  # fmt: skip


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_wrong_with_a_checkpoint_is_named(reason):
    content = copy.deepcopy(valid())
    WRONG[reason](content)
    with pytest.raises(ValueError, match=reason):
        nanogpt.from_checkpoint(content)


def test_nothing_of_the_claimed_size_is_allocated():
    """A file of a few kilobytes whose shapes are right, but for terabytes."""
    huge = {"vocab_size": 2**24, "n_embd": 2**16, "n_layer": 1, "n_head": 1}
    content = valid() | {"model_args": ARGUMENTS | huge}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in GPT(**content["model_args"]).state_dict().items()}
    content["model"] = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    with pytest.raises(UserError, match="share memory"):
        nanogpt.from_checkpoint(content)


def change(rng: random.Random, content: dict) -> None:
    """Delete, rename, add or replace a value or two of model_args or model."""
    values = [0, 1, -1, 3, 2**24, 2**63, 10**400, 1.5, float("nan"), None, True, "", "x" * 10**4, [], {}, {"a": {}}, (), b"a",
              torch.zeros(()), torch.zeros(0), torch.zeros(16), torch.zeros(16, 16), torch.zeros(11, 16).to_sparse(),
              torch.zeros(8, 16, device="meta"), torch.zeros(1).expand(11, 16), torch.zeros(16).half(), torch.ones(16).bool(),
              torch.zeros(16, 16).to_sparse_csr(), torch.zeros(16, dtype=torch.cfloat), torch.float32]  # fmt: skip
    for _ in range(rng.choice([1, 1, 2])):
        node = content[rng.choice(["model_args", "model"])]
        if not isinstance(node, dict) or not node:
            continue
        key, kind = rng.choice(list(node)), rng.randrange(7)
        if kind == 0:
            del node[key]
        elif kind == 1:
            node[rng.choice([f"_orig_mod.{key}", f"{key}.attn.bias", 3, None, "\ud800\0"])] = node.pop(key)
        elif kind == 2:
            content[rng.choice(["model_args", "model"])] = rng.choice(values)
        elif (
            kind == 3 and isinstance(node[key], torch.Tensor) and node[key].layout is torch.strided and node[key].dim()
        ):
            node[key] = rng.choice([node[key].double(), node[key][:1], node[key].t(), node[key].flatten()])
        elif kind == 4 and type(node[key]) is int:
            node[key] += rng.choice([-1, 1, 10**6])
        else:
            node[key] = rng.choice(values)


@pytest.mark.parametrize("count", [100, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_changed_checkpoint_works_or_is_a_user_error(count):
    rng, content, works = random.Random(1), valid(), 0
    for _ in range(count):
        changed = {**content, "model": dict(content["model"]), "model_args": dict(ARGUMENTS)}
        change(rng, changed)
        try:
            pretrained = nanogpt.from_checkpoint(changed)
        except ValueError as error:
            assert 0 < len(str(error)) < 1000
            continue
        works += 1
        sizes = {"vocab_size": pretrained.vocab_size, "block_size": pretrained.block_size}
        GPT(**sizes, **pretrained.model).load_state_dict(pretrained.weights)
    assert 0 < works < count


def meta(chars: str = CHARS) -> dict:
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {char: i for i, char in enumerate(chars)}}


def read(tmp_path: Path, pickled: bytes):
    path = tmp_path / "meta.pkl"
    path.unlink(missing_ok=True)  # some file systems wait for the disk where a file is overwritten
    path.write_bytes(pickled)
    return nanogpt.read_meta(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
def test_the_vocabulary_in_every_protocol(tmp_path, protocol, dumps):
    for chars in (CHARS, "x", "".join(map(chr, range(3000)))):
        assert read(tmp_path, dumps(meta(chars), protocol)).chars == chars


WRONG_META = {
    "it must be a dict of vocab_size, itos and stoi": pickle.dumps({"vocab_size": 3}),
    "a dict of": pickle.dumps("itos"),
    "vocab_size=12, but itos has 11 characters": pickle.dumps(meta() | {"vocab_size": 12}),
    "the keys of itos": pickle.dumps(meta() | {"itos": dict(enumerate(CHARS, start=1))}),
    "single characters": pickle.dumps(meta() | {"itos": dict(enumerate(["ab", *CHARS[1:]]))}),
    "values of itos": pickle.dumps(meta() | {"itos": {i: i for i in range(11)}}),
    "inverse": pickle.dumps(meta() | {"stoi": {char: 0 for char in CHARS}}),
    "none twice": pickle.dumps(meta("aba")),
    "surrogates": pickle.dumps(meta("a\ud800")),
    "a string of characters": pickle.dumps(meta("")),
    "STACK_GLOBAL in its pickle": pickle.dumps(print, 4),
    "GLOBAL in its pickle": pickle.dumps(os.system, 0),
    "EMPTY_LIST in its pickle": pickle.dumps([meta()]),
    "BININT in its pickle": pickle.dumps(meta() | {"vocab_size": 10**6}),
    "exhausted": pickle.dumps(meta())[:-1],
    "damaged pickle": b"u.",
    "BINPUT in its pickle": b"}q\x05.",
    "only 3 remain": b"X\xff\xff\xff\x7fabc",
    "limit|LONG": b"L" + b"9" * 10**5 + b"L\n.",
    "more than 2,097,152 bytes": b"}" * 3 * 10**6,
}


@pytest.mark.parametrize("reason", WRONG_META)
def test_what_is_wrong_with_a_vocabulary_is_named(tmp_path, reason):
    with pytest.raises(UserError, match=rf"meta.pkl is not a character vocabulary .*({reason})"):
        read(tmp_path, WRONG_META[reason])


def test_a_missing_vocabulary(tmp_path):
    with pytest.raises(MissingFileError, match="no such file; nanoGPT's"):
        nanogpt.read_meta(tmp_path / "meta.pkl")
    with pytest.raises(MissingFileError):
        nanogpt.read_meta(tmp_path)


def test_a_vocabulary_takes_no_more_memory_than_its_size_explains(tmp_path):
    """The worst that 30,000 bytes can do, a dict per byte; a memo index of 2**32 - 1."""
    tracemalloc.start()
    for pickled in (
        b"}" * 30_000,
        b"(" * 30_000,
        b"}" + b"\x94" * 30_000,
        b"}r\xff\xff\xff\xff.",
        b"}j\xff\xff\xff\xff.",
    ):
        with pytest.raises(UserError):
            read(tmp_path, pickled)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000 + 100 * 30_000
    tracemalloc.stop()


@pytest.mark.parametrize("count", [3_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_changed_vocabulary_works_or_is_a_user_error(tmp_path, count):
    rng, pickles, works = random.Random(2), [pickle.dumps(meta(), protocol) for protocol in range(6)], 0
    for i in range(count):
        pickled = bytearray(pickles[i % 6])
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(pickled))
            with_what = bytes(rng.choices(rng.choice([range(256), b"})(.udsXK\x8c\x94qhpgIV\n"]), k=rng.randrange(3)))
            pickled[at : at + rng.randrange(3)] = with_what
        try:
            assert len(read(tmp_path, bytes(pickled)).chars) == 11
            works += 1
        except UserError as error:
            assert len(str(error)) < 1000
    assert 0 < works < count
