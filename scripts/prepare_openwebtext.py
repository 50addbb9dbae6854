"""Documents -> token files for data=openwebtext. See --help."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from gptlab import cli, config
from gptlab.data.files import available_cores, data_folder, load_gpt2_tokenizer, text_files
from gptlab.errors import UserError
from gptlab.run import Run


def prepare_openwebtext(cfg: config.Prepare) -> None:
    """Tokenize a data set of the Hugging Face hub, or local files, into `out`."""
    from gptlab.data import documents, prepare
    from gptlab.tokenizer import BPETokenizer

    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = Path(os.path.expanduser(cfg.out)) if cfg.out else data_folder(None) / "openwebtext"
    prepare.check_folder(out)
    files = text_files(cfg.path, "path") if cfg.path is not None else []
    tokenizer = None
    if cfg.tokenizer == "gpt2":  # before a download that takes hours
        tokenizer = load_gpt2_tokenizer("learn a vocabulary from the documents with tokenizer=bpe vocab_size=8192")
    if files:
        dataset, parts = None, documents.parts_of(files)
        source = {"path": cfg.path, "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    else:
        dataset = load_dataset(cfg.hub, cfg.hub_config, cfg.hub_split, cfg.hub_revision, cfg.text_key)
        parts = documents.parts_of_dataset(dataset)
        source = {key: getattr(cfg, key) for key in ("hub", "hub_config", "hub_split", "hub_revision")}
    print(f"{len(parts):,} parts, {sum(part.size for part in parts) / 1e6:,.0f} MB -> {out}", flush=True)
    if tokenizer is None:
        print(f"learning {cfg.vocab_size:,} tokens from a sample of up to 100 MB", flush=True)
        tokenizer = BPETokenizer.learn(documents.sample(parts, cfg.text_key, dataset), cfg.vocab_size)
    meta = prepare.prepare(
        out,
        parts,
        tokenizer,
        source=source,
        text_key=cfg.text_key,
        dataset=dataset,
        val_share=cfg.val_share,
        split_seed=cfg.split_seed,
        processes=cfg.processes or available_cores(),
    )
    summarize(out, meta, cfg.text_key)


def load_dataset(hub: str, name: str | None, split: str, revision: str | None, text_key: str) -> Any:
    """A data set of the hub, downloaded into the cache of Hugging Face's `datasets` (54 GB for OpenWebText).

    Raises:
        UserError: it cannot be loaded, or has no such column.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(hub, name, split=split, revision=revision)
    except Exception as error:  # of the library's many kinds, all mean that there is no data set
        fix = "use your own files with path=texts/*.jsonl"
        if "scripts are no longer supported" in str(error):
            fix = "try the hub's own conversion with hub_revision=refs/convert/parquet"
        raise UserError(f"hub={hub} cannot be loaded ({type(error).__name__}: {error}); {fix}") from None
    if text_key not in dataset.column_names:
        raise UserError(f"text_key={text_key} must be a column of {hub}: {', '.join(dataset.column_names)}")
    return dataset.select_columns([text_key])


def summarize(out: Path, meta: dict[str, Any], text_key: str) -> None:
    for split in ("train", "val"):
        entry = meta[split]
        print(
            f"{split}.bin: {entry['tokens']:,} tokens, {entry['documents']:,} documents, {entry['bytes']:,} bytes of text"
        )
    if meta["val"]["tokens"] < 10_000:
        print("few validation tokens; a larger val_share (into another folder) has more documents")
    if meta["unreadable"]:
        print(
            f"left out {meta['unreadable']:,} rows without text under text_key={text_key}, or files that are not UTF-8"
        )
    is_name = out.name.isascii() and out.name.replace("-", "_").isidentifier() and out.name != "openwebtext"
    print(
        f"\nnext:\n  python -m gptlab.train data=openwebtext data.path={Run(out)}{f' data.name={out.name}' * is_name}"
    )


if __name__ == "__main__":
    try:
        cli.main(prepare_openwebtext, "prepare")
    except SystemExit as end:
        if end.code == 130:
            print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        raise
