"""Peers that are libraries, as programs: python benchmark_peers.py {mingpt,hugging_face} SETTINGS

Each trains its own model with its own Trainer and the defaults of both, but for the SETTINGS (JSON: sizes, dropout, batch,
device) and the optimizer's numbers that all programs of the benchmark share. The data are random windows of the
`train.bin` in a folder as nanoGPT's prepare.py writes it. Every 10 steps a line names the step, until it is killed.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

STEPS = 1_000_000
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


class Windows(Dataset):
    """The token ids from each position on, (block_size + 1,)."""

    def __init__(self, folder: Path, block_size: int) -> None:
        self.ids, self.block_size = np.fromfile(folder / "train.bin", dtype=np.uint16), block_size

    def __len__(self) -> int:
        return len(self.ids) - self.block_size

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(self.ids[i : i + self.block_size + 1].astype(np.int64))


class Pairs(Windows):
    """For minGPT: inputs and targets, (block_size,) each."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        ids = super().__getitem__(i)
        return ids[:-1], ids[1:]


class Examples(Windows):
    """For Hugging Face, whose models shift the labels themselves; the last position has none."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = super().__getitem__(i)[:-1]
        return {"input_ids": ids, "labels": ids}


def say(step: int, loss: float) -> None:
    print(f"step {step}: loss {loss:.4f}", flush=True)


def mingpt(s: dict[str, Any], vocab_size: int) -> None:
    sys.path.insert(0, s["path"])
    from mingpt.model import GPT
    from mingpt.trainer import Trainer

    config = GPT.get_default_config()
    sizes = {key: s[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), s["dropout"])
    config.merge_from_dict({"model_type": None, "vocab_size": vocab_size, **sizes, **dropout})
    model = GPT(config)

    config = Trainer.get_default_config()
    config.merge_from_dict(
        {
            "device": s["device"], "max_iters": STEPS, "batch_size": s["batch_size"], "learning_rate": LR, "betas": BETAS,
            "weight_decay": WEIGHT_DECAY, "grad_norm_clip": CLIP,
        }
    )  # fmt: skip
    trainer = Trainer(config, model, Pairs(Path(s["folder"]), s["block_size"]))
    trainer.set_callback(
        "on_batch_end", lambda trainer: trainer.iter_num % 10 or say(trainer.iter_num, trainer.loss.item())
    )
    trainer.run()


def hugging_face(s: dict[str, Any], vocab_size: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Say(TrainerCallback):  # the Trainer's own lines do not name the step
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            say(state.global_step, float(logs["loss"]))

    sizes = {key: s[key] for key in ("n_layer", "n_head", "n_embd")}
    dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), s["dropout"])
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=s["block_size"], activation_function="gelu", bos_token_id=None,
        eos_token_id=None, **sizes, **dropout,
    )  # fmt: skip
    on_cpu = s["device"] == "cpu"
    arguments = TrainingArguments(
        output_dir="out", max_steps=STEPS, per_device_train_batch_size=s["batch_size"], learning_rate=LR,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP, warmup_steps=100,
        lr_scheduler_type="cosine", logging_steps=10, report_to="none", save_strategy="no", use_cpu=on_cpu, bf16=not on_cpu,
    )  # fmt: skip
    data = Examples(Path(s["folder"]), s["block_size"])
    Trainer(GPT2LMHeadModel(config), arguments, train_dataset=data, callbacks=[Say()]).train()


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    meta = pickle.loads((Path(settings["folder"]) / "meta.pkl").read_bytes())  # written by benchmark.py
    {"mingpt": mingpt, "hugging_face": hugging_face}[sys.argv[1]](settings, meta["vocab_size"])
