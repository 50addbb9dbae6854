"""scripts/export_hf.py, and folders that transformers writes, with transformers as the judge."""

import itertools
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pretrained import gpt, logits
from test_tokenizer import learned
from torch import nn

from gptlab import sources, tokenizer_json
from gptlab.config import Export
from gptlab.errors import UserError
from gptlab.model import GPT
from gptlab.pretrained import copy_weights, from_hf
from gptlab.tokenizer import CharTokenizer

SCRIPT = Path(__file__).parents[1] / "scripts/export_hf.py"
TEXT = "To be, or not\n\tto be:  that's 1 🙂 <|end|>\r\n"


@pytest.fixture(scope="module")
def transformers():
    """Its import takes seconds: only once it is needed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def export(script: dict[str, Any], model: nn.Module, tokenizer: Any, out: Path) -> str:
    script["write_folder"](out, *script["folder_content"](model, tokenizer))
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    return str(out)


def load(folder: Path) -> GPT:
    """A folder in Hugging Face's format, in as many files as it has."""
    tensors = {
        name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()
    }
    pretrained = from_hf(json.loads((folder / "config.json").read_text()), tensors)
    model = GPT(vocab_size=pretrained.vocab_size, block_size=pretrained.block_size, **pretrained.model).eval()
    copy_weights(pretrained.weights, model)
    return model


def theirs(transformers, folder: str | Path, kind: str = "AutoModelForCausalLM"):
    """Their model of a folder, which must have exactly the weights that it asks for."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


KINDS = list(itertools.product([False, True], ["erf", "tanh"], [1, 8]))


def test_a_model_there_and_back(transformers, script, tmp_path):
    """Every kind of GPT, and what transformers writes of it, have the same logits."""
    ids = torch.arange(18).view(3, 6) % 11
    for i, (bias, gelu, multiple) in enumerate(KINDS):
        ours = gpt(bias=bias, gelu=gelu, vocab_multiple=multiple)
        model = theirs(transformers, export(script, ours, CharTokenizer("0123456789+"), tmp_path / f"{i}"))
        model.save_pretrained(tmp_path / f"{i}/again")
        with torch.no_grad():
            expected = ours(ids)[..., :11]
            assert expected.abs().max() > 0.5
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(load(tmp_path / f"{i}/again")(ids), expected, atol=1e-5, rtol=0)


def test_folders_of_transformers(transformers, tmp_path):
    """The whole model and the bare one, in several files, in 16 bits."""
    config = transformers.GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=3, n_head=4)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    ids = torch.arange(24).view(2, 12) % 40
    with torch.no_grad():
        for name in ("whole", "bare", "sharded"):
            torch.testing.assert_close(load(tmp_path / name)(ids), model(ids).logits, atol=1e-5, rtol=0)
        for dtype in (torch.float16, torch.bfloat16):
            model.to(dtype).save_pretrained(tmp_path / str(dtype))
            rounded = theirs(transformers, tmp_path / str(dtype)).float()
            torch.testing.assert_close(load(tmp_path / str(dtype))(ids), rounded(ids).logits, atol=1e-5, rtol=0)


def test_tokenizers_and_generation(transformers, script, tmp_path):
    """AutoTokenizer gives the ids and the text back, also from what transformers writes; greedy text is the same."""
    odd = CharTokenizer("".join(sorted(set(TEXT + "\0\x85\u2028"))))
    for name, tokenizer in {"char": odd, "digits": CharTokenizer("0123456789"), "bpe": learned()}.items():
        model = gpt(vocab_size=tokenizer.vocab_size, block_size=24, bias=False)
        folder = export(script, model, tokenizer, tmp_path / name)
        auto = transformers.AutoTokenizer.from_pretrained(folder)
        text = "0123998" if name == "digits" else TEXT
        ids = tokenizer.encode(text).tolist()
        assert auto(text)["input_ids"] == ids and auto.decode(ids) == text
        assert len(auto) == tokenizer.vocab_size and auto.model_max_length == 24
        assert auto.eos_token_id == getattr(tokenizer, "end_of_text", None)
        if name != "bpe":
            with pytest.raises(Exception, match="Missing"):
                auto("λ")
        auto.save_pretrained(tmp_path / f"{name}/again")
        again = json.loads((tmp_path / f"{name}/again/tokenizer.json").read_text())
        assert tokenizer_json.from_json(again).state() == tokenizer.state()
        prompt = torch.tensor([ids[:6]])
        their_model = theirs(transformers, folder)
        assert their_model.generation_config.eos_token_id == auto.eos_token_id
        written = their_model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        with torch.no_grad():
            assert torch.equal(model(written)[0, 5:-1].argmax(-1), written[0, 6:])


@pytest.mark.slow
def test_gpt2s_tokenizer_in_transformers(transformers, script, tmp_path, gpt2_files):
    """Also by GPT2Tokenizer, which makes its own of vocabulary and merges."""
    from gptlab.data.files import load_gpt2_tokenizer

    tokenizer = load_gpt2_tokenizer("")
    folder = export(script, gpt(vocab_size=50257), tokenizer, tmp_path / "out")
    text = TEXT + Path(__file__).read_text()
    for kind in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        ids = kind.from_pretrained(folder)(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        kind.from_pretrained(folder).save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again/tokenizer.json").read_text())
        assert tokenizer_json.from_json(again).tokens == tokenizer.tokens


class Custom(GPT):
    pass


def test_custom_classes_are_refused_by_name(script):
    digits = CharTokenizer("0123456789+")
    with pytest.raises(UserError, match="Custom is a custom model"):
        script["folder_content"](Custom(vocab_size=11, block_size=6, n_layer=1, n_head=1, n_embd=8), digits)
    with pytest.raises(UserError, match="SimpleTokenizer is a custom tokenizer"):
        script["folder_content"](gpt(), type("SimpleTokenizer", (CharTokenizer,), {})("0123456789+"))


@pytest.mark.parametrize(
    ("option", "key"), [({"position": "rotary"}, "model.position=rotary"), ({"ngrams": [2]}, "model.ngrams"),
                        ({"tie_weights": False}, "model.tie_weights=false")]
)  # fmt: skip
def test_what_gpt2_lacks_is_refused_by_key(script, option, key):
    """Exported without it, the model would give other logits without a word."""
    model = GPT(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=8, **option)
    with pytest.raises(UserError, match=f"{key}: Hugging Face's GPT-2 has no such option; export a model without"):
        script["folder_content"](model, CharTokenizer.from_text("abcde"))


def test_a_folder_is_complete_or_absent(script, tmp_path):
    """An unwritable place, a file that cannot be written: one error, and nothing is left."""
    files, weights = script["folder_content"](gpt(), CharTokenizer("0123456789+"))
    (tmp_path / "file").write_text("")
    for out, content in ((tmp_path / "file/out", files), (tmp_path / "out", {**files, "no/such.json": {}})):
        with pytest.raises(UserError, match=r"out=.* cannot be written"):
            script["write_folder"](out, content, weights)
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of a run with padding in its vocabulary."""
    model = {
        "_target_": "gptlab.model.GPT",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "bias": False,
        "vocab_multiple": 64,
    }
    state = gpt(bias=False, vocab_multiple=64).state_dict()
    content = {"config": {"model": model, "data": {"block_size": 6}}, "tokenizer": CharTokenizer("0123456789+").state(),
               "state_dict": {f"model.{name}": weight for name, weight in state.items()}, "data": {}}  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_becomes_a_folder(script, checkpoint, transformers, tmp_path, capsys):
    """The lines that are printed load it. What is wrong with a command is said in one line."""
    out = tmp_path / "new"
    given = {"ckpt": str(checkpoint), "init_from": None, "meta": None, "out": str(out), "trust": False}
    for changes, text in [
        ({"out": None}, "out is missing; name a new folder"),
        ({"out": str(tmp_path)}, "exists; give a new folder"),
        ({"out": str(checkpoint)}, "exists; give a new folder"),
        ({"ckpt": None}, "ckpt is missing"),
    ]:
        with pytest.raises(UserError, match=text):
            script["export_hf"](Export(**given | changes))
    out.mkdir()  # an empty one is as good as none
    script["export_hf"](Export(**given))
    names = {"transformers": transformers}
    for line in capsys.readouterr().out.splitlines()[1:]:
        exec(line.strip(), names)
    expected = logits(gpt(bias=False, vocab_multiple=64))
    ids = names["tokenizer"](["01234", "56780"], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(names["model"](ids).logits[..., :9], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_circle(script, transformers, tmp_path):
    """nanoGPT -> gptlab -> Hugging Face -> gptlab: the same logits and tokens at every station."""
    chars = "".join(sorted(set(TEXT)))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": False, "vocab_size": len(chars)}
    model = gpt(**sizes)
    torch.save({"model": model.state_dict(), "model_args": sizes}, tmp_path / "ckpt.pt")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    first = sources.load(str(tmp_path / "ckpt.pt"))
    script["write_folder"](tmp_path / "out", *script["folder_content"](first.model, first.tokenizer))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "back")
    tokenizer.save_pretrained(tmp_path / "back")
    last = sources.load(str(tmp_path / "back"))
    ids = torch.tensor([first.tokenizer.encode(TEXT).tolist()])[:, :16]
    assert tokenizer(TEXT)["input_ids"] == last.tokenizer.encode(TEXT).tolist() == first.tokenizer.encode(TEXT).tolist()
    with torch.no_grad():
        for logits in (first.model(ids), theirs(ids).logits, last.model(ids)):
            torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=1e-5)


def test_the_command(checkpoint, tmp_path):
    for arguments, status in ((["out=new"], 0), (["out=new"], 2), (["outt=new"], 2), (["--help"], 0)):
        command = [sys.executable, str(SCRIPT), f"ckpt={checkpoint}", *arguments]
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new"]
