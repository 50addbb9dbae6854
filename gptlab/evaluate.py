"""python -m gptlab.evaluate: what a validation measures, over a whole split, of any weights and data."""

import os
import sys
from pathlib import Path
from typing import Any

from gptlab import cli, config, inherit
from gptlab.errors import UserError
from gptlab.run import write_json

UNITS = {"loss": "nats per token", "accuracy": "of the problems answered exactly", "tokens": "predicted"}


def evaluate(cfg: config.Evaluate) -> None:
    """Print a table, and write it to `out`. With the precision, windows, threads and linear layers of its run, a checkpoint
    gets the very numbers of its validation."""
    from gptlab import linear, sources, train

    train.import_lightning()
    import torch

    from gptlab.data.files import available_cores
    from gptlab.sample import choose_device

    check_writable(cfg.out)
    name = inherit.choose(cfg.ckpt, cfg.init_from)
    device = choose_device(cfg.device)
    source = sources.load(name, meta=cfg.meta, trust=cfg.trust)
    settings = source.config.get("trainer")
    settings = settings if isinstance(settings, dict) else {}  # the file may hold anything
    seed = source.config.get("seed")  # by which a custom data set may split
    data = train.make_data(cfg.data, seed if isinstance(seed, int) else 0, source.tokenizer)
    train.check_same_tokenizer(data, source)
    if cfg.split == "train":
        if not hasattr(data, "train_ids"):
            raise UserError(f"split=train: data={data.name} has no end; only split=val can be measured")
        data.val_ids, data.val_windows = data.train_ids, None
    precision = cfg.precision or next((p for p in config.PRECISIONS if p == settings.get("precision")), "32")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU; on a CPU use precision=32 or bf16")
    threads = settings.get("threads")
    if device.type == "cpu" and isinstance(threads, int) and 1 <= threads <= 4 * available_cores():
        torch.set_num_threads(threads)  # the last bits depend on it
    model = source.model
    layers = "torch"
    if settings.get("linear") == "onednn" and device.type == "cpu" and precision == "32":
        if linear.has_operators():
            linear.use_onednn(model)
            layers = "onednn"
        else:
            print("WARNING: this torch lacks oneDNN's linear layers, which the run had; the last digits may differ")
    if source.config["model"].get("compile") is True:
        model.compile()
    measured = measure(model, data, device, precision)
    result = {
        "weights": source.name, "data": data.record, "split": cfg.split, "block_size": data.block_size,
        "precision": precision, "linear": layers, "device": str(device), **measured,
    }  # fmt: skip
    show(result)
    if cfg.out:
        write_json(Path(cfg.out).expanduser(), result)


def check_writable(out: str | None) -> None:
    """Make the folder of the file `out`. Raises UserError: before the work, not after it."""
    if out is not None:
        path = Path(os.path.abspath(os.path.expanduser(out)))
        if os.path.lexists(path):
            raise UserError(f"out={out} exists; give a new file, such as out=figures.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"out={out}: cannot be written ({error.strerror}); give a file in a writable folder"
            ) from None


def measure(model: Any, data: Any, device: Any, precision: str) -> dict[str, float]:
    """Loss and the rest over the validation of `data`, in the way that training measures it."""
    import lightning as L
    import torch

    from gptlab.callbacks.exact_match import ExactMatch
    from gptlab.module import GPTModule

    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")  # as in training
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
