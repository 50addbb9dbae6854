"""python -m gptlab.evaluate: what a validation measures, over a whole split, of any weights and data."""

import sys
from pathlib import Path
from typing import Any

from gptlab import cli, config
from gptlab.errors import UserError
from gptlab.run import write_json

UNITS = {"loss": "nats per token", "accuracy": "of the problems answered exactly", "tokens": "predicted"}


def evaluate(cfg: config.Evaluate) -> None:
    """Print a table, and write it to `out`. With the precision, windows and threads of its run, a checkpoint gets the very
    numbers of its validation."""
    from gptlab import sources, train
    from gptlab.sample import choose_device

    device = choose_device(cfg.device)
    source = sources.load(sources.choose(cfg.ckpt, cfg.init_from), meta=cfg.meta, trust=cfg.trust)
    run = source.config
    data = train.make_data(cfg.data, run.get("seed", 0), source.tokenizer)
    train.check_same_tokenizer(data, source)
    if cfg.split == "train":
        if not hasattr(data, "train_ids"):
            raise UserError(f"split=train: data={data.name} has no end; only split=val can be measured")
        data.val_ids, data.val_windows = data.train_ids, None
    precision = cfg.precision or run.get("trainer", {}).get("precision", "32")
    if precision not in config.PRECISIONS or (precision == "fp16" and device.type == "cpu"):
        raise UserError(f"precision={precision} needs a GPU; on a CPU use 32 or bf16")
    measured = measure(source.model, data, run, device, precision)
    result = {
        "weights": source.name, "data": data.record, "split": cfg.split, "block_size": data.block_size,
        "precision": precision, "device": str(device), **measured,
    }  # fmt: skip
    show(result)
    if cfg.out:
        write_json(Path(cfg.out).expanduser(), result)


def measure(model: Any, data: Any, run: dict[str, Any], device: Any, precision: str) -> dict[str, float]:
    """Loss and the rest over the validation of `data`, in the way that training measures it."""
    import lightning as L
    import torch

    from gptlab.callbacks.exact_match import ExactMatch
    from gptlab.module import GPTModule
    from gptlab.train import quiet_lightning

    quiet_lightning()
    threads = run.get("trainer", {}).get("threads")
    if isinstance(threads, int) and device.type == "cpu":
        torch.set_num_threads(threads)  # the last bits depend on it
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")  # as in training
    if run.get("model", {}).get("compile"):
        model.compile()
    module = GPTModule(
        model,
        optim_config={"grad_clip": 0.0, "skip_nonfinite": 0},
        token_bytes=data.tokenizer.token_bytes(),
        seed=0,
        micro_batch_size=None,
        log_every=1,
        metadata={},
    )
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None or device.type == "cpu" else [device.index],
        precision=config.PRECISIONS[precision],
        logger=False,
        callbacks=[ExactMatch(show=0)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        use_distributed_sampler=False,
    )
    trainer.validate(module, datamodule=data, verbose=False)
    values = {name.removeprefix("val/"): value for name, value in module.validated.items() if name != "step"}
    return {**values, "tokens": int(module.val_metrics.tokens)}


def show(result: dict[str, Any]) -> None:
    print(f"{result['weights']} on {result['data']['name']}, split={result['split']}:")
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"):
        if name in result:
            value = f"{result[name]:,}" if name == "tokens" else f"{result[name]:.4f}"
            print(f"  {name.replace('_', ' '):<14} {value:>10} {UNITS.get(name, '')}".rstrip())


if __name__ == "__main__":
    cli.main(evaluate, "evaluate")
