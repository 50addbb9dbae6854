"""A model and its tokenizer -> a folder in Hugging Face's format. See --help."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from gptlab import cli, config, inherit
from gptlab.errors import UserError


def export_hf(cfg: config.Export) -> None:
    """Write the model of `ckpt` or `init_from` to `out`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # removes the unfinished folder
    if cfg.out is None:
        raise UserError("out is missing; name a new folder, such as out=my_gpt")
    out = Path(os.path.abspath(os.path.expanduser(cfg.out)))
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out} exists; give a new folder")

    name = inherit.choose(cfg.ckpt, cfg.init_from)
    from gptlab import sources

    source = sources.load(name, meta=cfg.meta, trust=cfg.trust)
    write_folder(out, *folder_content(source.model, source.tokenizer))
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    print(
        f"{name}, {parameters:,} parameters -> {out}; in Python:\n"
        f"  model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"  tokenizer = transformers.AutoTokenizer.from_pretrained({str(out)!r})"
    )


def folder_content(model: Any, tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON files by name, and the weights. Raises UserError for a custom model or tokenizer, or one that GPT-2's format cannot express."""
    from gptlab import pretrained, tokenizer_json
    from gptlab.model import GPT

    if type(model) is not GPT:
        raise UserError(
            f"{type(model).__name__} is a custom model; Hugging Face's GPT-2 can express gptlab.model.GPT alone"
        )
    tokens = tokenizer_json.to_json(tokenizer)
    try:
        architecture, weights = pretrained.to_hf(model)
    except ValueError as error:
        raise UserError(f"{error}; export a model without") from None
    end = {"bos_token": tokenizer.END_OF_TEXT, "eos_token": tokenizer.END_OF_TEXT} if tokens["added_tokens"] else {}
    ids = {f"{token}_id": tokenizer.end_of_text for token in end}
    files = {
        "config.json": architecture | ids,
        "tokenizer.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.block_size,
            "clean_up_tokenization_spaces": False,
            **end,
        },
    }
    return files, weights


def write_folder(out: Path, files: dict[str, Any], weights: dict[str, Any]) -> None:
    """Write a folder that is either complete or absent. Raises UserError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, value in files.items():
            (temporary / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written ({error}); make space there, or give another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    cli.main(export_hf, "export_hf")
