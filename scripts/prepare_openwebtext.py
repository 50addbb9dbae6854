"""Documents -> token files for data=openwebtext. See --help."""

import os
import sys
from pathlib import Path
from typing import Any

from gptlab import cli, config
from gptlab.run import shell_path


def prepare_openwebtext(cfg: Any) -> None:
    """Tokenise a data set of the Hugging Face hub, or local files, into `out`."""
    if problems := list(config.prepare_problems(cfg)):
        raise ValueError("\n".join(problems))
    from gptlab.data import bpe, documents, prepare
    from gptlab.data.files import data_folder, text_files

    out = Path(os.path.expanduser(cfg.out)) if cfg.out else data_folder(None) / "openwebtext"
    prepare.check_folder(out)
    parts, dataset, source = [], None, {}
    if cfg.path is not None:
        files = text_files(cfg.path, "path")
        parts = documents.parts_of(files)
        source = {"path": cfg.path, "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    tokenizer = bpe.gpt2() if cfg.tokenizer == "gpt2" else None  # before a download that takes hours
    if cfg.path is None:
        dataset = load(cfg.hub, cfg.hub_config, cfg.hub_split, cfg.hub_revision, cfg.text_key)
        parts = documents.rows_of(dataset)
        source = {key: cfg[key] for key in ("hub", "hub_config", "hub_split", "hub_revision")}
    print(f"{len(parts):,} parts, {sum(part.size for part in parts) / 1e6:,.0f} MB -> {out}", flush=True)
    if tokenizer is None:
        print(f"learning {cfg.vocab_size:,} tokens from a sample of up to 100 MB", flush=True)
    tokenizer = tokenizer or bpe.learn(documents.sample(parts, cfg.text_key, dataset), cfg.vocab_size)
    meta = prepare.prepare(
        out,
        parts,
        tokenizer,
        source=source,
        text_key=cfg.text_key,
        dataset=dataset,
        val_share=cfg.val_share,
        split_seed=cfg.split_seed,
        processes=cfg.processes or cores(),
    )
    for split in ("train", "val"):
        about = meta[split]
        print(
            f"{split}.bin: {about['tokens']:,} tokens of {about['documents']:,} documents, {about['bytes']:,} bytes of text"
        )
    if meta["val"]["tokens"] < 10_000:
        print("few tokens for validation: a larger val_share gives it more documents (into another folder)")
    if meta["unreadable"]:
        print(
            f"left out: {meta['unreadable']:,} rows without text under text_key={cfg.text_key}, or files that are not UTF-8"
        )
    plain = out.name.isascii() and out.name.replace("-", "_").isidentifier()
    name = f" data.name={out.name}" if plain and out.name != "openwebtext" else ""
    print(f"\nnext:\n  python -m gptlab.train data=openwebtext data.path={shell_path(out)}{name}")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(hub: str, name: str | None, split: str, revision: str | None, text_key: str) -> Any:
    """A data set of the hub, downloaded into the cache of Hugging Face's `datasets` (54 GB for OpenWebText).

    Raises:
        ValueError: it cannot be had, or has no such column.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(hub, name, split=split, revision=revision)
    except Exception as error:  # of the library's many kinds, all mean that there is no data set
        hint = "Files of your own: 'path=texts/*.jsonl'"
        if "scripts are no longer supported" in str(error):
            hint = "The hub's own conversion of it may be whole: hub_revision=refs/convert/parquet"
        raise ValueError(
            f"hub={hub}: the data set cannot be loaded ({type(error).__name__}: {error}). {hint}"
        ) from None
    if text_key not in dataset.column_names:
        raise ValueError(f"text_key={text_key}: {hub} has the columns {', '.join(dataset.column_names)}")
    return dataset.select_columns([text_key])


if __name__ == "__main__":
    try:
        cli.main(prepare_openwebtext, "prepare")
    except SystemExit as end:
        if end.code == 130:
            print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        raise
