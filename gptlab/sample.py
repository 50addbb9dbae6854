"""python -m gptlab.sample: text from a checkpoint. Reads nothing but the checkpoint."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptlab import cli, config
from gptlab.errors import MissingFileError, UserError
from gptlab.run import find_checkpoint
from gptlab.terminal import printable


def sample(cfg: config.Sample) -> None:
    """Write `num_samples` continuations of the prompt to standard output, as they are drawn."""
    if cfg.ckpt is None:
        raise UserError("ckpt is missing; give a run folder, a checkpoint file, or latest: ckpt=outputs/NAME/DATE")
    path = find_checkpoint(cfg.ckpt)
    prompt = read_prompt(cfg.prompt, cfg.prompt_file)

    import torch

    from gptlab import checkpoint
    from gptlab.data.notation import notation_of
    from gptlab.generate import generate

    device = choose_device(cfg.device)
    model, tokenizer, saved = checkpoint.load(path, device, trust=cfg.trust)
    prompt = prompt or tokenizer.start
    notation = notation_of(saved["data"])
    question = notation.parse(prompt) if notation else None  # 85+50=
    try:
        ids = tokenizer.encode(question or prompt)
    except ValueError as error:
        raise UserError(f"{'prompt_file' if cfg.prompt_file else 'prompt'}: {error}") from None
    idx = torch.from_numpy(ids.astype("int64")).to(device)[None]
    show = printable if sys.stdout.isatty() else str
    for i in range(cfg.num_samples):
        generator = torch.Generator(device).manual_seed(cfg.seed + i)
        length = notation.n_answer if question else cfg.max_new_tokens
        new = generate(model, idx, length, temperature=cfg.temperature, top_k=cfg.top_k, generator=generator)
        if i:
            print("\n" + "-" * 20)
        if question:
            answer = tokenizer.decode([int(next_id) for next_id in new])
            print(show(notation.format_question(question) + notation.format_answer(answer)))
            continue
        print(show(prompt), end="")
        for piece in decode_stream(tokenizer, ids.tolist(), (int(next_id) for next_id in new)):
            print(show(piece), end="", flush=True)
        print()


def decode_stream(tokenizer: Any, prompt: list[int], new: Iterable[int]) -> Iterator[str]:
    """The text that each new id adds. All ids are decoded together, as a token may be a word that needs a space, or part
    of a character, which is held back until it is complete."""
    ids, written = list(prompt), tokenizer.decode(prompt)
    for next_id in new:
        ids.append(next_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(written) :]
            written = text
    yield tokenizer.decode(ids)[len(written) :]


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """Raises UserError if both are given, or the file cannot be read."""
    if prompt_file is None:
        return prompt or ""
    if prompt is not None:
        raise UserError("prompt and prompt_file exclude each other; give one of them")
    try:
        return Path(prompt_file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise MissingFileError(f"prompt_file={prompt_file}: {error.strerror}") from None
    except ValueError as error:  # of the name or the content
        raise UserError(f"prompt_file={prompt_file}: not UTF-8 text ({error})") from None


def choose_device(device: str) -> Any:
    """Raises UserError for a device that torch does not know or see here."""
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"device={device}: not available ({reason}); use auto, cpu, cuda or mps") from None
    return torch.device(device)


if __name__ == "__main__":
    cli.main(sample, "sample")
