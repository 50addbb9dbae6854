"""Bits per byte: the bits that all counted tokens cost, over the bytes of text that they stand for; worked by hand."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from gptlab.data.files import load_gpt2_tokenizer
from gptlab.data.text import TextData
from gptlab.data.windows import Ids, ValBatches
from gptlab.module import GPTModule
from gptlab.tokenizer import BPETokenizer, CharTokenizer


class Fixed(nn.Module):
    """Gives each token the same probability everywhere: `probabilities`, else all alike."""

    def __init__(self, size: int, probabilities: list[float] | None = None) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log() if probabilities else torch.zeros(size))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*idx.shape, -1)


def module_for(tokenizer, model: nn.Module | None = None) -> GPTModule:
    model = model or Fixed(tokenizer.vocab_size)
    return GPTModule(model, optim_config={"grad_clip": 0.0, "skip_nonfinite": 0}, token_bytes=tokenizer.token_bytes(), seed=1, micro_batch_size=None,
                     log_every=1, metadata={})  # fmt: skip


def validated(folder, module: GPTModule, data) -> dict[str, float]:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    trainer.validate(module, data, verbose=False)
    return module.validated


def validate(folder, tokenizer, ids, model: nn.Module | None = None, block_size=4) -> dict[str, float]:
    """In batches of 2 windows, the last of which are not full: every token but the first is a target once."""
    windows = ValBatches(Ids(np.asarray(ids), tokenizer.vocab_size), block_size, None, 2, 0, 1)
    return validated(folder, module_for(tokenizer, model), DataLoader(windows, batch_size=None))


@pytest.mark.parametrize(("text", "block_size"), [("aé€🙂", 1), ("aé€🙂", 4), ("aé€🙂", 100), ("🙂€éa", 4)])
def test_characters_of_one_to_four_bytes(tmp_path, text, block_size):
    """20 characters, 19 of them targets, of 2 bits each; 5 x (1 + 2 + 3 + 4) bytes but those of the first character."""
    tokenizer = CharTokenizer("aé€🙂")
    shown = validate(tmp_path, tokenizer, tokenizer.encode(text * 5), block_size=block_size)
    assert shown["val/loss"] == pytest.approx(math.log(4), rel=1e-5)
    assert shown["val/bits_per_byte"] == pytest.approx(38 / (50 - len(text[0].encode())), rel=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_tokens_of_different_cost(tmp_path, block_size):
    """Probabilities 1/2, 1/4, 1/8, 1/8, so 1, 2, 3 and 3 bits. Targets a a é € a 🙂: 1 + 1 + 2 + 3 + 1 + 3 = 11 bits over
    1 + 1 + 2 + 3 + 1 + 4 = 12 bytes. (The mean of bits / bytes over the tokens would be 23 / 24, over windows another.)"""
    tokenizer = CharTokenizer("aé€🙂")
    model = Fixed(4, [1 / 2, 1 / 4, 1 / 8, 1 / 8])
    shown = validate(tmp_path, tokenizer, tokenizer.encode("🙂aaé€a🙂"), model, block_size)
    assert shown["val/bits_per_byte"] == pytest.approx(11 / 12, rel=1e-5)
    assert shown["val/loss"] == pytest.approx(11 * math.log(2) / 6, rel=1e-5)
    assert shown["val/perplexity"] == pytest.approx(2 ** (11 / 6), rel=1e-5)


def test_a_learned_bpe(tmp_path):
    """ " x", " xy" and " xyz" are its merges. Targets " xyz" (4 bytes), "y" (1), " x" (2), the end of the text (0), " xy"
    (3) and "🙂" in four tokens of 1 byte: 9 tokens, 14 bytes."""
    tokenizer = BPETokenizer.learn([" xyz xyz xyz xy xy x y"], 260)
    ids = [*tokenizer.encode(" xy xyzy x"), tokenizer.end_of_text, *tokenizer.encode(" xy🙂")]
    assert len(ids) == 10
    shown = validate(tmp_path, tokenizer, ids)
    assert shown["val/bits_per_byte"] == pytest.approx(math.log2(260) * 9 / 14, rel=1e-5)


def test_the_end_of_a_text_costs_bits_and_is_no_bytes(tmp_path):
    """Probabilities 1/2 for "a", 1/4 for the end. Targets end a end a a: 2 + 1 + 2 + 1 + 1 = 7 bits, 3 bytes."""
    tokenizer = BPETokenizer.learn([""], 257)
    a, end = tokenizer.tokens.index(b"a"), tokenizer.end_of_text
    probabilities = [1 / 4 / 255] * 257
    probabilities[a], probabilities[end] = 1 / 2, 1 / 4
    shown = validate(tmp_path, tokenizer, [a, end, a, end, a, a], Fixed(257, probabilities))
    assert shown["val/bits_per_byte"] == pytest.approx(7 / 3, rel=1e-5)


@pytest.mark.parametrize("size", [50_257, 50_304])
def test_gpt2(gpt2_files, tmp_path, size):
    """Targets " world" (6), end (0), "Hello" (5), " world" (6), end (0): 5 tokens, 17 bytes; also where the model's
    vocabulary is padded."""
    tokenizer = load_gpt2_tokenizer("")
    ids = [15496, 995, 50256, 15496, 995, 50256]
    assert tokenizer.decode(ids[:2]) == "Hello world"
    shown = validate(tmp_path, tokenizer, ids, Fixed(size))
    assert shown["val/bits_per_byte"] == pytest.approx(math.log2(size) * 5 / 17, rel=1e-5)


TEXT = "Zoë said: “naïve” 🙂, and so she left.\n\n" * 40


@pytest.fixture(params=["char", "bpe", "gpt2"])
def text_data(request, tmp_path):
    """One text, by each tokenizer."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    size = 280 if request.param == "bpe" else None
    return TextData(path=str(tmp_path / "a.txt"), tokenizer=request.param, vocab_size=size, seed=1, name="a_text",
                    block_size=8, batch_size=4)  # fmt: skip


def test_all_tokenizers_are_measured_on_the_same_bytes(tmp_path, text_data):
    """A uniform model of V tokens spends log2 V bits on each of the n - 1 targets; what it is divided by must be the
    bytes of the last tenth of the characters, but for those of the first token."""
    text_data.prepare_data()
    text_data.setup("fit")
    tokenizer, ids = text_data.tokenizer, text_data.val_ids
    sizes, text_bytes = tokenizer.token_bytes(), len(TEXT[int(0.9 * len(TEXT)) :].encode())
    assert sizes[ids].sum() == text_bytes
    shown = validated(tmp_path, module_for(tokenizer), text_data)
    assert shown["val/bits_per_byte"] == pytest.approx(
        math.log2(tokenizer.vocab_size) * (len(ids) - 1) / (text_bytes - sizes[ids[0]]), rel=1e-5
    )
