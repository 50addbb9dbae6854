"""python -m gptlab.sample: text from a checkpoint. Reads nothing but the checkpoint."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptlab import cli, config
from gptlab.run import find_checkpoint


def sample(cfg: Any) -> None:
    """Write `num_samples` continuations of the prompt to standard output, as they are drawn."""
    if cfg.ckpt is None:
        raise ValueError("ckpt is missing: give a run folder or a checkpoint file, ckpt=outputs/NAME/DATE")
    if problems := list(config.value_problems(cfg)):
        raise ValueError("\n".join(problems))
    path = find_checkpoint(cfg.ckpt)
    text = read_prompt(cfg.prompt, cfg.prompt_file)

    import torch

    from gptlab import checkpoint
    from gptlab.generate import generate

    device = choose_device(cfg.device)
    model, tokenizer, _ = checkpoint.load(path, device, trust=cfg.trust)
    text = text or tokenizer.start
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:
        raise ValueError(f"{'prompt' if cfg.prompt_file is None else 'prompt_file'}: {error}") from None
    idx = torch.from_numpy(ids.astype("int64")).to(device)[None]
    for i in range(cfg.num_samples):
        generator = torch.Generator(device).manual_seed(cfg.seed + i)
        if i:
            print("\n" + "-" * 20)
        print(text, end="")
        new = generate(
            model, idx, cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, generator=generator
        )
        for piece in pieces(tokenizer, ids.tolist(), (int(next_id) for next_id in new)):
            print(piece, end="", flush=True)
        print()


def pieces(tokenizer: Any, prompt: list[int], new: Iterable[int]) -> Iterator[str]:
    """The text that each new id adds to what was there: decoded with all before it, as a token may be a word that needs
    a space, or a part of a character, which is held back until it is whole."""
    ids, shown = list(prompt), tokenizer.decode(prompt)
    for next_id in new:
        ids.append(next_id)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """Raises ValueError if both are given, FileNotFoundError if the file cannot be read."""
    if prompt_file is None:
        return prompt or ""
    if prompt is not None:
        raise ValueError("prompt and prompt_file exclude each other: give one of them")
    try:
        return Path(prompt_file).expanduser().read_bytes().decode("utf-8")
    except OSError as error:
        raise FileNotFoundError(f"prompt_file={prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file={prompt_file} is not UTF-8 text (byte {error.start})") from None


def choose_device(device: str) -> Any:
    """Raises ValueError for a device that torch does not know or see here."""
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device} cannot be used here ({str(error).splitlines()[0][:80]}); it may be auto, cpu, cuda or mps"
        ) from None
    return torch.device(device)


if __name__ == "__main__":
    cli.main(sample, "sample")
