"""python -m gptlab.sample: text from a checkpoint. Reads nothing but the checkpoint."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptlab import cli, config, inherit
from gptlab.errors import MissingFileError, UserError
from gptlab.terminal import printable

BATCH = 32  # samples generated together, at most


def sample(cfg: config.Sample) -> None:
    """Write `num_samples` continuations of the prompt to standard output, the first of them as it is drawn."""
    prompt, name = read_prompt(cfg.prompt, cfg.prompt_file), inherit.choose(cfg.ckpt, cfg.init_from)

    import torch

    from gptlab import sources
    from gptlab.data.notation import notation_of
    from gptlab.generate import Sampler, generate

    device = choose_device(cfg.device)
    source = sources.load(name, meta=cfg.meta, trust=cfg.trust)
    model, tokenizer = prepare_model(source.model, device, cfg.precision, cfg.num_samples), source.tokenizer
    prompt = prompt or tokenizer.start
    notation = notation_of(source.config["data"])
    question = notation.parse(prompt) if notation else None  # 85+50=
    try:
        ids = tokenizer.encode(question or prompt).tolist()
    except ValueError as error:
        raise UserError(f"{'prompt_file' if cfg.prompt_file else 'prompt'}: {error}") from None
    sampler = Sampler(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
    length = notation.n_answer if question else cfg.max_new_tokens
    with torch.inference_mode():  # less work per operator than the no_grad of `generate`
        for first in range(0, cfg.num_samples, BATCH):
            seeds = range(cfg.seed + first, cfg.seed + min(first + BATCH, cfg.num_samples))
            steps = generate(model, [ids] * len(seeds), length, sampler=sampler, seeds=seeds, context=cfg.context)
            if first:
                print(SEPARATOR)
            if question:
                answers = [notation.format_answer(tokenizer.decode(answer)) for answer in zip(*steps, strict=True)]
                print(show(f"\n{SEPARATOR}\n".join(notation.format_question(question) + answer for answer in answers)))
            else:
                write(prompt, steps, [TextStream(tokenizer, ids, cfg.stop) for _ in seeds])


SEPARATOR = "\n" + "-" * 20


def write(prompt: str, steps: Iterator[list[int | None]], streams: list["TextStream"]) -> None:
    """Print the first row while it is generated, and the others after it."""
    print(show(prompt), end="")
    rest = [""] * len(streams)
    for step in steps:
        pieces = [stream.add(new) for stream, new in zip(streams, step, strict=True)]
        print(show(pieces[0]), end="", flush=True)
        rest = [text + piece for text, piece in zip(rest, pieces, strict=True)]
        if all(stream.ended for stream in streams):
            break
    print(show(streams[0].finish()))
    for text, stream in zip(rest[1:], streams[1:], strict=True):
        print(f"{SEPARATOR}\n{show(prompt + text + stream.finish())}")


def show(text: str) -> str:
    return printable(text) if sys.stdout.isatty() else text


class TextStream:
    """The text that new ids add to a prompt's, up to the string `stop` and without it.

    All ids are decoded together, as a token may be a word that needs a space, or part of a character, which is held back
    until it is complete; so is what may be the beginning of `stop`.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], stop: str | None) -> None:
        self.tokenizer, self.ids, self.stop, self.ended = tokenizer, [*prompt], stop, False
        self._before = self._written = len(tokenizer.decode(prompt))  # characters

    def add(self, new: int | None) -> str:
        """What is certain to come next."""
        if new is None or self.ended:
            return ""
        self.ids.append(new)
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\ufffd") else self._take(text, certain=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.ended else self._take(self.tokenizer.decode(self.ids), certain=True)

    def _take(self, text: str, certain: bool) -> str:
        end = len(text)
        if self.stop:
            if (at := text.find(self.stop, self._before)) >= 0:
                end, self.ended = at, True
            elif not certain:
                end -= next((n for n in range(len(self.stop) - 1, 0, -1) if text.endswith(self.stop[:n])), 0)
        piece = text[self._written : end]
        self._written = max(self._written, end)
        return piece


def prepare_model(model: Any, device: Any, precision: str, rows: int) -> Any:
    """The model on its device; on a CPU with packed weights, in bfloat16 where the CPU is fast at it."""
    import torch

    from gptlab import linear

    if device.type != "cpu":
        return model.to(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    fast = linear.fast_bf16()
    if precision == "bf16" and not fast:
        raise UserError("precision=bf16: this CPU does not multiply bfloat16; use precision=32")
    return linear.pack(model, torch.bfloat16 if fast and precision != "32" else torch.float32, rows)


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
