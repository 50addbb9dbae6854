"""The options of the fast recipe (n-grams, rotary positions, a head of its own, Muon) with everything that a run does."""

import json
import runpy

import pytest
import torch
import yaml
from conftest import TEXT, TINY, metrics, weights

from gptlab import config, sources
from gptlab.errors import UserError

FAST = [*TINY, "data=text", "data.path=my.txt", "model.n_head=4", "model.n_embd=32", "model.position=rotary", "model.tie_weights=false",
        "model.ngrams=[2,3]", "model.ngram_rows=500", "model.ngram_dropout=0.3", "optim.grad_clip=0",
        "optim.muon_lr=0.02", "optim.embedding_lr=0.03", "optim.head_lr=0.01",
        "optim.schedule=linear", "optim.cooldown=0.5", "optim.min_lr=0", "optim.warmup_steps=0", "model.dropout=0.1", "data.micro_batch_size=5"]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "my.txt").write_text(TEXT)


def test_a_run_and_all_that_follows(gptlab, tmp_path, text):
    """Muon's state, tables and the head must be saved and loaded: a resumed run ends as an uninterrupted one, evaluate gives
    its validation again, and weights that start another run or a sample are the saved ones."""
    shown = gptlab("train", *FAST, "hydra.run.dir=whole").stdout
    assert "learning rate: 0.001 (blocks by Muon 0.02, embeddings 0.03, head 0.01) after" in shown
    gptlab("train", *FAST, "trainer.max_steps=3", "hydra.run.dir=run")
    longer = gptlab("train", "resume=run").stdout.split("\n  python -m gptlab.train ")[1].split()
    assert longer == ["resume=run", "trainer.max_steps=6", "optim.decay_steps=6"]  # at a rate of 0 nothing is learned
    gptlab("train", "resume=run", "trainer.max_steps=4")
    assert [line for line in metrics(tmp_path / "run") if line["step"] == 4] == [
        line for line in metrics(tmp_path / "whole") if line["step"] == 4
    ]
    ours, theirs = (
        torch.load(tmp_path / f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("run", "whole")
    )
    ours, theirs = ((run["optimizer_states"][0], run["state_dict"]) for run in (ours, theirs))
    assert ours[0]["param_groups"] == theirs[0]["param_groups"]
    torch.testing.assert_close((ours[0]["state"], ours[1]), (theirs[0]["state"], theirs[1]), atol=0, rtol=0)

    gptlab("evaluate", "ckpt=whole", "out=figures.json")
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text())["loss"] == summary["best"]["val/loss"]
    source = sources.load(str(tmp_path / "whole"))
    loaded = source.model.state_dict()
    saved = weights(tmp_path / "whole", "best")
    assert all(torch.equal(loaded[name.removeprefix("model.")], weight) for name, weight in saved.items())
    assert len(gptlab("sample", "ckpt=whole", "max_new_tokens=80", "prompt=9 green").stdout) > 80

    tuning = ["init_from=whole", "data=text", "data.path=my.txt", "data.block_size=32", *TINY[:3], *TINY[4:]]
    gptlab("train", *tuning, "hydra.run.dir=tuned")
    tuned = yaml.safe_load((tmp_path / "tuned/config.yaml").read_text())
    assert (tuned["model"]["position"], tuned["model"]["ngrams"]) == ("rotary", [2, 3])
    first = next(line["val/loss"] for line in metrics(tmp_path / "tuned") if "val/loss" in line)
    assert first < 1.02 * summary["last"]["val/loss"]  # random weights would be 1.3 times as bad
    gptlab("train", *tuning, "model.ngram_dropout=0.1", "hydra.run.dir=tuned_otherwise")
    assert yaml.safe_load((tmp_path / "tuned_otherwise/config.yaml").read_text())["model"]["ngram_dropout"] == 0.1
    refused = gptlab("train", *tuning, "model.tie_weights=true", status=2)
    assert "model.tie_weights: decided by init_from=" in refused.stderr
    script = runpy.run_path(str(config.CONF.parent / "scripts/export_hf.py"))
    with pytest.raises(UserError, match=r"model.position=rotary, model.ngrams, model.tie_weights=false: Hugging Face"):
        script["folder_content"](source.model, source.tokenizer)


def test_a_run_of_an_older_gptlab_resumes(gptlab, tmp_path, text):
    """Without the keys that it did not have, in config.yaml, in the checkpoints, and in the optimizer's groups."""
    tiny = [*TINY, "data=text", "data.path=my.txt", "optim.warmup_steps=0"]
    gptlab("train", *tiny, "hydra.run.dir=whole")
    gptlab("train", *tiny, "trainer.max_steps=2", "hydra.run.dir=old")

    def without_added(values):
        for key in config.ADDED:
            node, _, name = key.partition(".")
            assert name in values[node]
            del values[node][name]
        return values

    file = tmp_path / "old/config.yaml"
    file.write_text(yaml.safe_dump(without_added(yaml.safe_load(file.read_text()))))
    paths = [*(tmp_path / "old/checkpoints").glob("*.ckpt")]
    for path, content in [(path, torch.load(path, weights_only=True)) for path in paths]:
        path.unlink()  # another name may share the file
        without_added(content["config"])
        for group in content["optimizer_states"][0]["param_groups"]:
            del group["lr_scale"], group["kind"]
        torch.save(content, path)
    gptlab("train", "resume=old", "trainer.max_steps=4")
    assert torch.equal(*(weights(tmp_path / name)["model.transformer.wte.weight"] for name in ("old", "whole")))
    shown = gptlab("compare", "old", "whole").stdout
    assert "position" not in shown and "momentum" not in shown


@pytest.mark.parametrize("key", ["muon_lr", "embedding_lr", "head_lr"])
def test_a_resume_keeps_the_learning_rates(gptlab, tmp_path, text, key):
    gptlab("train", *FAST, "trainer.max_steps=1", "hydra.run.dir=run")
    assert f"optim.{key}" in gptlab("train", "resume=run", "trainer.max_steps=4", f"optim.{key}=0.5", status=2).stderr
