"""Whole runs, started as a user starts them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from composed import composed
from conftest import DROPOUT, TINY, metrics, same, weights, write_token_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from gptlab import inherit
from gptlab.config import CONF
from gptlab.data.files import python_docs

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def test_default_run_folder_is_the_contract(new_process, tmp_path):
    done = new_process("train", *TINY, "tags=[a,b]")
    (run,) = (tmp_path / "outputs/python_docs").iterdir()
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert names == {
        "config.yaml", "run.json", "metrics.jsonl", "summary.json", "train.log",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/previous.ckpt",
        ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", ".lock", ".saved",
    }  # fmt: skip
    assert list(run.glob("events.out.tfevents.*"))

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "${" not in (run / "config.yaml").read_text()
    assert config["trainer"]["precision"] == "32" and config["name"] == "python_docs"

    about = json.loads((run / "run.json").read_text())
    assert about["tags"] == ["a", "b"] and "gptlab.train" in about["command"]
    assert (
        about["data"]["name"] == "python_docs" and len(about["data"]["sha256"]) == len(about["vocabulary_sha256"]) == 64
    )
    assert {"torch", "lightning", "gptlab", "python"} <= set(about["versions"])

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["checkpoint"]) == ("finished", 4, "checkpoints/best.ckpt")
    assert summary["last"]["step"] == 4 and summary["data"] == about["data"]
    assert summary["best"]["val/loss"] == min(line["val/loss"] for line in metrics(run) if "val/loss" in line)

    lines = metrics(run)
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 2, 4]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert {"train/lr", "train/grad_norm", "train/clipped_share"} <= set(lines[-2])
    assert {"val/perplexity", "val/bits_per_byte"} <= set(lines[-1])

    shown = done.stdout
    assert "tokens per optimizer step: 768 (12 sequences x 64 tokens)" in shown
    place = str(run.relative_to(tmp_path))
    for command in ("python -m gptlab.sample ckpt=", "tensorboard --logdir ", "python -m gptlab.train resume="):
        assert command + place in shown
    assert "bits per byte" in shown and "tokens/s" in shown
    assert done.stderr == ""  # no adverts, no warnings


def test_tensorboard_shows_scalars_config_and_hyper_parameters(gptlab, tmp_path):
    """What the Scalars, Text and HParams tabs are made from; a resume adds to it and doubles nothing."""
    gptlab("train", *TINY, "hydra.run.dir=run", "tags=[first]")
    gptlab("train", "resume=run", "trainer.max_steps=6")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {tag.partition("/")[0] for tag in events.Tags()["scalars"]} == {
        "train",
        "watch",
        "val",
    }
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("val/loss")] == [0, 2, 4, 6]
    config = events.Tensors("settings/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in config.splitlines() if line)  # code, for Markdown
    assert yaml.safe_load(textwrap.dedent(config))["model"]["n_layer"] == 3
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["optim.lr"].number_value == 1e-3 and given["data.name"].string_value == "python_docs"
    assert not any("_target_" in key or "compile" in key for key in given)
    experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    shown = [info.name.tag for info in HParamsPluginData.FromString(experiment).experiment.metric_infos]
    assert "val/bits_per_byte" in shown


def test_next_commands_work_as_printed(gptlab, tmp_path):
    shown = gptlab("train", *TINY).stdout
    commands = [line.split() for line in shown.splitlines() if line.startswith("  python -m gptlab.")]
    assert [command[2] for command in commands] == ["gptlab.sample", "gptlab.train"]
    for command in commands:
        gptlab(command[2].removeprefix("gptlab."), *command[3:])
    (run,) = (tmp_path / "outputs/python_docs").iterdir()
    assert json.loads((run / "summary.json").read_text())["steps"] == 8


def test_one_seed_one_result_bitwise(gptlab, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        gptlab("train", *DROPOUT, f"hydra.run.dir={name}", f"seed={seed}")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert same(a, b) and not same(a, c)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_without_validation_the_end_is_saved(gptlab, tmp_path):
    done = gptlab("train", *TINY, "+trainer.extra.limit_val_batches=0", "hydra.run.dir=run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["checkpoint"] == "checkpoints/last.ckpt"
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert "gptlab.sample" in done.stdout


def test_without_callbacks_and_logger(gptlab, tmp_path):
    done = gptlab("train", *TINY[:-1], "~callbacks", "~logger", "hydra.run.dir=run")
    assert json.loads((tmp_path / "run/summary.json").read_text())["checkpoint"] is None
    assert "next:" not in done.stdout and "bits per byte" in done.stdout


def test_nothing_is_overwritten(gptlab, tmp_path):
    """Neither what the run wrote, nor what Hydra did."""
    gptlab("train", *TINY, "hydra.run.dir=run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "already holds a run" in gptlab("train", *TINY, "seed=9", "hydra.run.dir=run", status=2).stderr
    for path, content in before.items():
        assert path.read_bytes() == content or path.name == ".lock", path


def test_a_sweep_is_one_process_per_job(gptlab, tmp_path):
    """Here without network, which its parent decides once for all jobs."""
    chosen = ["experiment=shakespeare_char", *TINY, "data.url=http://127.0.0.1:9/", "model.n_layer=1,2"]
    done = gptlab("train", "-m", *chosen)
    (sweep,) = (tmp_path / "sweeps/python_docs").iterdir()
    configs = [yaml.safe_load((sweep / job / "config.yaml").read_text()) for job in "01"]
    assert [(c["model"]["n_layer"], c["name"]) for c in configs] == [(1, "python_docs"), (2, "python_docs")]
    assert all((sweep / job / file).exists() for job in "01" for file in ("summary.json", "checkpoints/best.ckpt"))
    assert all((sweep / job / "job.log").read_text().count("tokens per optimizer step") == 1 for job in "01")
    assert "tokens per optimizer step" not in done.stdout and done.stdout.count("training on python_docs") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow  # test_jobs.py has the same with small programs
def test_a_sweep_continues_after_a_job_that_fails(gptlab, tmp_path):
    """What validation cannot see fails that job alone; the sweep ends with status 1. (null stays null in a job: as a
    string it would name a file.)"""
    for name, text in (("bad", b"caf\xe9" * 100), ("good", b"coffee " * 300)):
        (tmp_path / f"{name}.txt").write_bytes(text)
    text = ["data=text", "data.block_size=8", "data.val_path=null", "callbacks.sample_text.prompt=null"]
    done = gptlab("train", "-m", *TINY, *text, "data.path=bad.txt,good.txt", status=1)
    (sweep,) = (tmp_path / "sweeps/text").iterdir()
    said = "bad.txt is not UTF-8 text"
    assert (
        said in done.stdout
        and said in (sweep / "0/error.txt").read_text()
        and said in (sweep / "results.csv").read_text()
    )
    assert "Traceback" not in (sweep / "0/job.log").read_text()
    assert not (sweep / "0/summary.json").exists() and (sweep / "1/summary.json").exists()


@pytest.mark.slow
def test_train_returns_the_metric_that_a_sweeper_optimises(gptlab, tmp_path, monkeypatch):
    """Asked of the function itself, in a process that plays the sweeper."""
    code = (
        "from gptlab import cli, train; import json; cli.main(lambda cfg: print('returned', train.train(cfg)), 'train')"
    )
    command = [sys.executable, "-c", code, *TINY, "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    returned = float(done.stdout.rpartition("returned ")[2])
    assert returned == json.loads((tmp_path / "run/summary.json").read_text())["best"]["val/loss"]


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "python_stdlib_bpe" else []) for name in EXPERIMENTS],
)
def test_every_experiment_takes_two_steps(gptlab, tmp_path, experiment, bottles):
    small = ["trainer.max_steps=2", "optim.warmup_steps=0", "data.val_windows=5", "hydra.run.dir=run"]
    if experiment.startswith("shakespeare"):
        (tmp_path / "text.txt").write_text(python_docs()[:20_000])
        small += ["data.path=text.txt", "data.sha256=null"]
    if experiment == "shakespeare_bpe":
        small += ["data.tokenizer=bpe", "data.vocab_size=300"]  # GPT-2's would be a download
    if experiment == "gpt2_124m":
        write_token_files(tmp_path / "data/openwebtext")
        small += ["model.n_layer=1", "model.n_embd=24", "data.block_size=16", "data.batch_size=4"]
    if experiment == "finetune_shakespeare":  # GPT-2 would be a download
        small += [f"init_from={bottles}/run", f"data.path={bottles}/my.txt", "data.sha256=null", "data.block_size=16"]
    gptlab("train", f"experiment={experiment}", *small)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_shakespeare_char_is_nanogpts_recipe(gptlab, hardware):
    shown = gptlab("train", "experiment=shakespeare_char", f"hardware={hardware}", "--cfg", "job", "--resolve").stdout
    cfg = yaml.safe_load(shown)
    m, d, o, t = cfg["model"], cfg["data"], cfg["optim"], cfg["trainer"]
    recipe = (m["n_layer"], m["n_head"], m["n_embd"], m["dropout"], d["block_size"], d["batch_size"], t["max_steps"])
    assert recipe == {"cpu": (4, 4, 128, 0.0, 64, 12, 2000), "gpu": (6, 6, 384, 0.2, 256, 64, 5000)}[hardware]
    assert m["bias"] is False and t["accelerator"] == hardware and o["decay_steps"] == t["max_steps"]
    assert (o["lr"], o["min_lr"], o["schedule"], o["warmup_steps"]) == (1e-3, 1e-4, "cosine", "auto")
    assert (o["betas"], o["weight_decay"], o["grad_clip"]) == ([0.9, 0.99], 0.1, 1.0)


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_finetune_shakespeare_is_nanogpts_recipe(hardware):
    """config/finetune_shakespeare.py with the defaults of train.py; on a CPU a smaller model and batch. The sizes are those of
    the weights, known without a download."""
    values, _ = composed("train", "experiment=finetune_shakespeare", f"hardware={hardware}")
    cfg = inherit.train_config(values, ["experiment", "hardware"])
    d, o, t = cfg["data"], cfg["optim"], cfg["trainer"]
    assert (cfg["init_from"], cfg["model"]["n_layer"]) == {"cpu": ("gpt2", 12), "gpu": ("gpt2-xl", 48)}[hardware]
    assert (d["block_size"], d["batch_size"]) == {"cpu": (256, 8), "gpu": (1024, 32)}[hardware]
    assert (d["micro_batch_size"], d["tokenizer"], t["max_steps"], t["val_every"]) == (1, "init_from", 20, 5)
    assert (o["lr"], o["schedule"], o["warmup_steps"]) == (3e-5, "constant", 0)
    assert (o["betas"], o["weight_decay"], o["grad_clip"]) == ([0.9, 0.95], 0.1, 1.0)


def test_a_chosen_model_wins_over_the_recipe(gptlab):
    shown = gptlab("train", "experiment=shakespeare_char", "model=gpt-nano", "--cfg", "job").stdout
    assert yaml.safe_load(shown)["model"]["n_layer"] == 3


def test_local_copy_of_shakespeare(gptlab, tmp_path, shakespeare):
    gptlab("train", "experiment=shakespeare_char", *TINY, f"data.path={shakespeare}", "hydra.run.dir=run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["data"]["name"] == "shakespeare_char"
    checkpoint = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert str(Path(shakespeare).parent) not in str({key: checkpoint[key] for key in ("config", "data", "tokenizer")})


def test_no_network_is_said_loudly_and_never_called_shakespeare(gptlab, tmp_path):
    """The text that is trained on instead is an override like any other, and a resume keeps to it."""
    done = gptlab("train", "experiment=shakespeare_char", *TINY, "data.url=http://127.0.0.1:9/", "hydra.run.dir=run")
    assert done.stdout.count("*** WARNING") == 2  # at the start and at the end
    assert "WARNING" in done.stdout and "training on python_docs" in done.stdout
    run = tmp_path / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["name"] == config["data"]["name"] == "python_docs"
    assert "data=python_docs" in yaml.safe_load((run / ".hydra/overrides.yaml").read_text())
    for name in ("metrics.jsonl", "summary.json"):
        assert "python_docs" in (run / name).read_text() and "shakespeare" not in (run / name).read_text(), name
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["data"]["name"] == "python_docs"
    gptlab("train", "resume=run", "trust=true", "trainer.max_steps=6")  # without asking for a download


def test_no_network_and_no_fallback_is_an_error(gptlab):
    stderr = gptlab("train", "experiment=shakespeare_char", "data.fallback=null", "data.url=http://127.0.0.1:9/x", status=2).stderr  # fmt: skip
    for needed in ("http://127.0.0.1:9/x", "86c4e6aa9db7", "shakespeare_char.txt", "data.path=FILE"):
        assert needed in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hardware=gpu"], "hardware=gpu, but torch sees no accelerator; use hardware=cpu"),
        (["callbacks.sample_text.prompt=é"], "'é'"),
        (["callbacks.sample_text._target_=os.NoSuch"], "callbacks.sample_text._target_=os.NoSuch: cannot import it"),
        (["callbacks.sample_text._target_=textwrap.TextWrapper"], "textwrap.TextWrapper does not fit its keys"),
        (["trainer.strategy=magic"], "Lightning refuses these trainer.* values"),
        (["+trainer.extra.magic=1"], "Lightning refuses these trainer.* values"),
        (["data=addition", "data.block_size=7"], "data.block_size=7 must be 6"),
    ],
)
def test_what_only_a_library_can_refuse(gptlab, tmp_path, arguments, said):
    """As a text and with status 2, before anything of a run is written."""
    if "hardware=gpu" in arguments and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    done = gptlab("train", *TINY, *arguments, "hydra.run.dir=run", status=2)
    assert done.stderr.startswith("\nerror: ") and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run/config.yaml").exists()
