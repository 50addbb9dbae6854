"""init_from: runs that start from weights of a run, of nanoGPT, or in Hugging Face's format."""

import hashlib
import json
import pickle
import shlex
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from composed import composed
from conftest import TEXT, TINY, assert_same_end, metrics, weights
from huggingface_hub.errors import LocalEntryNotFoundError

from gptlab import config, inherit, sources
from gptlab.data.files import load_gpt2_tokenizer
from gptlab.model import GPT
from gptlab.tokenizer import CharTokenizer
from gptlab.tokenizer_json import to_json

RUN = [argument for argument in TINY if not argument.startswith(("model=", "optim.warmup"))] + ["optim.warmup_steps=0"]
CHARS = "".join(sorted(set(TEXT)))


@pytest.fixture(scope="module")
def made(bottles, tmp_path_factory):
    """my.txt; run: on it, with EMA; hf: a GPT-2 of transformers'; nano: nanoGPT's ckpt.pt and meta.pkl."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(bottles, folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 48, "vocab_size": len(CHARS)}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(folder / "hf")
    (folder / "hf/tokenizer.json").write_text(json.dumps(to_json(CharTokenizer(CHARS))))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "bias": False, "vocab_size": len(CHARS)}
    (folder / "nano").mkdir()
    model = {f"_orig_mod.{name}": weight for name, weight in GPT(**sizes).state_dict().items()}
    torch.save({"model": model, "model_args": {**sizes, "dropout": 0.2}, "iter_num": 7}, folder / "nano/ckpt.pt")
    meta = {"vocab_size": len(CHARS), "itos": dict(enumerate(CHARS)), "stoi": {c: i for i, c in enumerate(CHARS)}}
    (folder / "nano/meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def first_loss(gptlab, tmp_path, source, *more):
    """The validation loss at step 0 of a run that starts from the source, and the run's config.yaml."""
    shutil.rmtree(tmp_path / "tuned", ignore_errors=True)
    arguments = ["data=text", f"data.path={tmp_path}/my.txt", "hydra.run.dir=tuned", *more]
    said = gptlab("train", *RUN, f"init_from={source}", *arguments).stdout
    assert f"weights: those of {source}" in said.replace("/checkpoints/best.ckpt", "")
    loss = next(line["val/loss"] for line in metrics(tmp_path / "tuned") if "val/loss" in line)
    return loss, yaml.safe_load((tmp_path / "tuned/config.yaml").read_text())


@pytest.mark.parametrize("kind", ["run", "hf", "nano"])
def test_training_starts_where_the_weights_are(gptlab, tmp_path, made, kind):
    """The first validation is what `evaluate` says of the weights on the same text: same model, same tokens. (A run's are
    its averaged ones.) Then training moves them. The text has fewer characters than the vocabulary."""
    (tmp_path / "my.txt").write_text(TEXT.replace("z", "").replace("\n", " "))
    source = made / kind / ("ckpt.pt" if kind == "nano" else "")
    more = ["data.block_size=32", "model.dropout=0.1", "model.vocab_multiple=8"]
    loss, config = first_loss(gptlab, tmp_path, source, *more)
    data = ["data=text", "data.path=my.txt", "data.val_windows=20", "data.block_size=32"]
    gptlab("evaluate", f"init_from={source}", *data, "precision=32", "out=figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert loss == pytest.approx(figures["loss"], rel=1e-5)
    expected = sources.load(str(source))
    own = {**dict.fromkeys(sources.OWN, False), "dropout": 0.1, "ngram_dropout": 0.0, "vocab_multiple": 8}
    assert config["model"] == sources.gpt(expected.config["model"]) | own
    assert config["data"]["tokenizer"] == "init_from" and config["init_from"] == str(source)
    tuned, start = weights(tmp_path / "tuned"), expected.model.state_dict()
    name = "transformer.h.1.mlp.c_fc.weight"
    assert 0 < (tuned[f"model.{name}"] - start[name]).abs().max() < 0.1
    saved = torch.load(tmp_path / "tuned/checkpoints/last.ckpt", weights_only=True)
    assert saved["config"]["init_from"] == source.name and saved["tokenizer"]["chars"] == expected.tokenizer.chars


def test_a_resume_needs_the_source_no_more(gptlab, tmp_path, made):
    """It has a checkpoint of its own by then; and ends as an uninterrupted run does."""
    shutil.copytree(made / "run", tmp_path / "source")
    shutil.copy(made / "my.txt", tmp_path)
    start = [*RUN, "init_from=source", "data=text", "data.path=my.txt", "optim.decay_steps=20"]
    gptlab("train", *start, "trainer.max_steps=4", "hydra.run.dir=whole")
    gptlab("train", *start, "trainer.max_steps=2", "hydra.run.dir=run")
    shutil.rmtree(tmp_path / "source")
    gptlab("train", "resume=run", "trainer.max_steps=4")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert "init_from and resume exclude each other" in gptlab("train", "resume=run", "init_from=gpt2", status=2).stderr


@pytest.mark.slow
def test_a_sweep_over_sources(gptlab, tmp_path, made):
    sources_ = f"init_from={made}/run,{made}/hf"
    run = ["trainer.max_steps=2", "hydra.sweep.dir=sweep", "n_jobs=2", "data.block_size=32"]
    gptlab("train", "-m", *RUN, sources_, "data=text", f"data.path={made}/my.txt", *run)
    assert "init_from" in gptlab("compare", "sweep").stdout
    assert "trust" not in gptlab("train", "resume=sweep").stdout  # a path of weights is not code
    layers = [yaml.safe_load((tmp_path / f"sweep/{i}/config.yaml").read_text())["model"]["n_layer"] for i in (0, 1)]
    assert layers == [3, 2]
    error = gptlab("train", "-m", *RUN, sources_, "model.n_layer=2,3", status=2).stderr
    assert "model.n_layer: decided by init_from" in error


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"model.n_layer": 3, "model.bias": False},
            "model.n_layer, model.bias: decided by init_from=gpt2; leave out",
        ),
        ({"model": "gpt-mini"}, "model: init_from=gpt2 has model.n_layer=12"),
        ({"data.block_size": 2048}, "data.block_size=2048 must be <= 1024"),
        ({"init_from": "gpt-2"}, "gpt-2 is not a run folder.*did you mean gpt2"),
        ({"init_from": "openai-community/gpt2"}, "did you mean gpt2?"),
        ({"init_from": ""}, "init_from= is empty"),
    ],
)
def test_contradictions(changes, text):
    """Of the command line against the weights, before anything is downloaded."""
    values = {**composed("train")[0], "init_from": "gpt2"}
    for key, value in changes.items():
        values = config.with_value(values, key, value) if key != "model" else values
    with pytest.raises(ValueError, match=text):
        inherit.train_config(values, changes.keys())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["init_from=gpt2", "model.n_layer=3"], "model.n_layer: decided by init_from=gpt2"),
        (["init_from={made}/run", "meta=x"], "x: describes the tokens of nanoGPT's checkpoint"),
        (["init_from={made}/run", "data=addition"], "data=addition has other tokens than"),
        (["init_from={made}/run", "data=text", "data.path={made}/my.txt", "data.tokenizer=bpe", "data.vocab_size=300"], "has other tokens than"),
        (["init_from=latest"], "latest: no runs under"),
    ],
)  # fmt: skip
def test_refused(gptlab, tmp_path, made, arguments, text):
    error = gptlab("train", *RUN, *(argument.format(made=made) for argument in arguments), status=2).stderr
    assert text in error and "Traceback" not in error and not [*tmp_path.glob("outputs/*/*")]


def test_custom_code_needs_trust(gptlab, tmp_path, made):
    """In every program, before anything is imported."""
    (tmp_path / "evil.py").write_text("open('executed', 'w')")
    content = torch.load(made / "run/checkpoints/best.ckpt", weights_only=True)
    content["config"]["model"]["_target_"] = "evil.Model"
    torch.save(content, tmp_path / "evil.ckpt")
    for entry in ("train", "sizing", "sample", "evaluate"):
        data = [] if entry == "sample" else ["data=text", f"data.path={made}/my.txt"]
        assert "add trust=true" in gptlab(entry, "init_from=evil.ckpt", *data, status=2).stderr
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["_target_", 1])
def test_a_checkpoint_that_does_not_say_its_model(tmp_path, made, key):
    content = torch.load(made / "run/checkpoints/best.ckpt", weights_only=True)
    content["config"]["model"] = {"n_layer": 3} if key == "_target_" else {**content["config"]["model"], key: 2}
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd\.ckpt"):
        sources.architecture(str(tmp_path / "odd.ckpt"))
    with pytest.raises(ValueError, match=r"odd\.ckpt"):
        assert sources.load(str(tmp_path / "odd.ckpt")).model


def test_the_way_back_if_nothing_was_saved(gptlab, tmp_path, made):
    """Paths do not depend on the working directory; a source that is gone is named."""
    shutil.copytree(made / "nano", tmp_path / "nano")
    (tmp_path / "nano/meta.pkl").rename(tmp_path / "my.pkl")
    start = [
        *RUN,
        "init_from=nano/ckpt.pt",
        "meta=my.pkl",
        "data=text",
        f"data.path={made}/my.txt",
        "hydra.run.dir=run",
    ]
    gptlab("train", *start)
    for file in ("checkpoints", ".saved", "summary.json", "metrics.jsonl"):
        shutil.rmtree(path) if (path := tmp_path / "run" / file).is_dir() else path.unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    gptlab("train", "resume=../run", cwd=tmp_path / "elsewhere")
    for file in ("checkpoints", ".saved", "summary.json", "metrics.jsonl"):
        shutil.rmtree(path) if (path := tmp_path / "run" / file).is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "nano")
    assert "nothing was saved yet" in gptlab("train", "resume=run", status=2).stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hf/model.safetensors", "one file of a model in Hugging Face's format; give its folder"),
        ("hf/config.json", "give its folder"),
        ("nano", "for nanoGPT's checkpoint give .*ckpt.pt"),
        ("my.txt", "damaged, or not a checkpoint"),
        ("nowhere", "not a run folder.*pretrained: gpt2"),
    ],
)
def test_what_was_meant(made, name, text):
    with pytest.raises(ValueError, match=text):
        sources.load(str(made / name))


def test_the_same_tokenizer_may_be_named(gptlab, tmp_path, made):
    """data.tokenizer=char on the run's own text gives the same characters."""
    data = ["data=text", f"data.path={made}/my.txt", "data.tokenizer=char"]
    gptlab("train", *RUN, f"init_from={made}/run", *data, "trainer.max_steps=1", "hydra.run.dir=same")
    assert yaml.safe_load((tmp_path / "same/config.yaml").read_text())["data"]["tokenizer"] == "char"


# In this process.


def test_nanogpts_tokens_must_be_told(made, tmp_path):
    shutil.copy(made / "nano/ckpt.pt", tmp_path)
    with pytest.raises(
        ValueError, match=r"has 44 tokens and no meta.pkl beside it.*meta=FILE".replace("44", str(len(CHARS)))
    ):
        sources.load(str(tmp_path / "ckpt.pt"))
    source = sources.load(str(tmp_path / "ckpt.pt"), meta=str(made / "nano/meta.pkl"))
    assert source.tokenizer.chars == CHARS
    with pytest.raises(FileNotFoundError, match="meta=nowhere"):
        sources.load(str(tmp_path / "ckpt.pt"), meta="nowhere")


def test_nanogpts_padded_gpt2(tmp_path, gpt2_files):
    """50,304 rows without a meta.pkl are GPT-2's 50,257 tokens and nanoGPT's padding, which is dropped."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 50304}
    model = GPT(**sizes)
    torch.save({"model": model.state_dict(), "model_args": sizes}, tmp_path / "ckpt.pt")
    source = sources.load(str(tmp_path / "ckpt.pt"))
    ids = torch.randint(50257, (1, 16))
    assert source.tokenizer.vocab_size == source.model.vocab_size == 50257
    torch.testing.assert_close(source.model(ids), model.eval()(ids)[..., :50257], atol=1e-5, rtol=1e-5)


def test_an_old_format_is_refused_with_the_way_out(made, tmp_path):
    """The command works from any folder, whatever the file's name."""
    path = tmp_path / """it's "$(mine).pt"""
    torch.save(torch.load(made / "nano/ckpt.pt", weights_only=True), path, _use_new_zipfile_serialization=False)
    shutil.copy(made / "nano/meta.pkl", tmp_path)
    with pytest.raises(ValueError, match="save it again: ") as caught:
        sources.load(str(path))
    command = shlex.split(str(caught.value).partition("save it again: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
    assert sources.load(f"{path}.new").model.block_size == 64


@pytest.mark.parametrize("kind", ["sharded", "base"])
def test_other_folders_of_transformers(made, tmp_path, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "hf")
    if kind == "sharded":
        model.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
        assert len([*tmp_path.glob("hf/*.safetensors")]) > 1
    else:
        model.transformer.save_pretrained(tmp_path / "hf")
    shutil.copy(made / "hf/tokenizer.json", tmp_path / "hf")
    ids = torch.randint(len(CHARS), (2, 48))
    with torch.no_grad():
        theirs, ours = model.eval()(ids).logits, sources.load(str(tmp_path / "hf")).model(ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda hf: (hf / "model.safetensors").unlink(), "has no model.safetensors; gptlab reads safetensors only"),
        (lambda hf: (hf / "model.safetensors").write_bytes(b"\0" * 100), "is damaged, or no safetensors file"),
        (lambda hf: (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-9]), "is damaged"),
        (lambda hf: (hf / "config.json").write_text("{"), "config.json is damaged"),
        (lambda hf: (hf / "config.json").write_text("[]"), "not a mapping"),
        (lambda hf: (hf / "config.json").write_text('{"model_type": "llama"}'), "model_type='llama' must be gpt2"),
        (lambda hf: (hf / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
        (lambda hf: (hf / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}'), "tokenizer.json"),
        (lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'), "must name files of this folder"),
        (lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": 3}'), "index.json"),
    ],
)  # fmt: skip
def test_damaged_folders(made, tmp_path, damage, text):
    shutil.copytree(made / "hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(ValueError, match=text):
        sources.load(str(tmp_path / "hf"))


def test_a_folder_with_gpt2s_vocabulary_has_gpt2s_tokens(tmp_path, gpt2_files):
    """Without a file that says so, and with one that has more than gptlab can express. Other tokens are not taken for them:
    all losses and texts would be wrong, without an error."""
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    assert sources.load(str(tmp_path / "hf")).tokenizer.encode("Once upon").tolist() == [7454, 2402]
    content = to_json(load_gpt2_tokenizer("")) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
    assert sources.load(str(tmp_path / "hf")).tokenizer.encode("Once upon").tolist() == [7454, 2402]
    vocab = content["model"]["vocab"]
    vocab["Once"], vocab["upon"] = vocab["upon"], vocab["Once"]
    for text in (json.dumps(content), '{"model": {"type": "Unigram"}}', '{"model": 1}', "{garbage"):
        (tmp_path / "hf/tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            sources.load(str(tmp_path / "hf"))
    (tmp_path / "hf/tokenizer.json").unlink()
    (tmp_path / "hf/vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"vocab\.json"):
        sources.load(str(tmp_path / "hf"))


class Hub:
    """Hugging Face's cache and downloads: files in it by their SHA-256, as the library keeps them."""

    def __init__(self, folder, files, online):
        self.folder, self.files, self.online = folder, files, online
        self.blobs = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def download(self, repository, file, local_files_only=False):
        path = self.folder / "snapshot" / file
        if local_files_only and not path.exists():
            raise LocalEntryNotFoundError("not here")
        if not path.exists():
            (self.folder / "blobs").mkdir(exist_ok=True)
            (self.folder / "snapshot").mkdir(exist_ok=True)
            (self.folder / "blobs" / self.blobs[file]).write_bytes(self.files[file])
            path.symlink_to(self.folder / "blobs" / self.blobs[file])
        return str(path)


def test_the_hub(made, tmp_path, monkeypatch, gpt2_files):
    """Downloaded once; then its cache serves, also offline. A damaged download is found by its checksum."""
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    files = {name: (tmp_path / "hf" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub = Hub(tmp_path, files, online=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)

    def urlopen(url, timeout):
        if not hub.online:
            raise OSError("no network")
        assert url.endswith("openai-community/gpt2/resolve/main/config.json") and timeout <= 10
        return open(tmp_path / "hf/config.json")

    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    hub.online = False
    with pytest.raises(FileNotFoundError, match=r"gpt2 is not in Hugging Face's cache.*no network.*init_from=FOLDER"):
        sources.load("gpt2")
    hub.online = True
    first = sources.load("gpt2")
    hub.online = False
    second = sources.load("gpt2")
    assert first.tokenizer.vocab_size == 50257 and len(first.model.transformer.h) == 1
    assert all(torch.equal(a, b) for a, b in zip(first.weights.values(), second.weights.values(), strict=True))
    shutil.rmtree(tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "blobs")
    hub.online, hub.files["model.safetensors"] = True, b"x" + files["model.safetensors"]
    with pytest.raises(ValueError, match="the download of model"):
        sources.load("gpt2")


def test_notebooks(made):
    """What the README shows; nothing heavy is imported before."""
    code = f"""
import sys, gptlab
assert "torch" not in sys.modules and "lightning" not in sys.modules
model, tokenizer = gptlab.load({str(made / "run")!r})
import torch
assert "lightning" not in sys.modules and not model.training
print(model(torch.tensor([tokenizer.encode("12 green").tolist()])).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"torch.Size([1, 8, {len(CHARS)}])", done.stderr
