"""Texts by subwords: the split, where the vocabulary comes from, and samples that are whole characters."""

import functools

import numpy as np
import pytest
from conftest import pieces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptlab.data import files
from gptlab.data.files import load_gpt2_tokenizer
from gptlab.data.text import TextData
from gptlab.tokenizer import BPETokenizer

# Its 90 % end within the word "house", which is one token.
TEXT = ("Zoë said: “naïve” 🙂, and so she left\r\nfor  house\tnumber 1234.\n\n\n" * 60)[:3038]
SPLIT = int(0.9 * len(TEXT))


def text_data(path, tokenizer: str, vocab_size: int | None = None, **changes) -> TextData:
    data = TextData(path=str(path), tokenizer=tokenizer, vocab_size=vocab_size,
                    **{"seed": 1, "name": "a_text", "block_size": 8, "batch_size": 4, **changes})  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(params=["bpe", "gpt2"])
def kind(request) -> dict:
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return {"tokenizer": request.param, "vocab_size": 305 if request.param == "bpe" else None}


@pytest.mark.parametrize("piece", [1, 7, 1 << 18])
def test_the_split_is_by_characters(tmp_path, monkeypatch, kind, piece):
    """The same as encoding both parts on their own, however the file is read; a split by tokens, as the second
    assertion says, would be another."""
    monkeypatch.setattr(files, "PIECE", piece)
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    data = text_data(tmp_path / "a.txt", **kind)
    tokenizer = data.tokenizer
    assert TEXT[SPLIT - 4 : SPLIT + 2] == " house"
    whole = tokenizer.encode(TEXT).tolist()
    assert data.train_ids.tolist() + data.val_ids.tolist() != whole
    assert data.train_ids.tolist() == tokenizer.encode(TEXT[:SPLIT]).tolist()
    assert data.val_ids.tolist() == tokenizer.encode(TEXT[SPLIT:]).tolist()
    assert data.train_ids.dtype == data.val_ids.dtype == np.uint16
    if kind["tokenizer"] == "bpe":
        assert tokenizer.tokens == BPETokenizer.learn([TEXT[:SPLIT]], 305).tokens


def test_a_text_for_validation(tmp_path, kind):
    """It may have characters that the training text lacks: their bytes are tokens."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "b.txt").write_bytes("Привет, house number 5 ∀\n".encode() * 5)
    data = text_data(tmp_path / "a.txt", **kind, val_path=str(tmp_path / "b.txt"))
    assert data.tokenizer.decode(data.train_ids) == TEXT
    assert data.tokenizer.decode(data.val_ids) == "Привет, house number 5 ∀\n" * 5
    if kind["tokenizer"] == "bpe":
        assert data.tokenizer.tokens == BPETokenizer.learn([TEXT], 305).tokens


def test_tiny_shakespeare_is_nanogpts(shakespeare, gpt2_files):
    """As its data/shakespeare/prepare.py prints, and as tiktoken encodes each part at once."""
    import tiktoken

    data = text_data(shakespeare, "gpt2")
    assert (len(data.train_ids), len(data.val_ids)) == (301_966, 36_059)
    with open(shakespeare, encoding="utf-8", newline="") as file:
        text = file.read()
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    assert data.train_ids.tolist() == encode(text[: int(0.9 * len(text))])
    assert data.val_ids.tolist() == encode(text[int(0.9 * len(text)) :])


@functools.cache
def vocabulary(name: str) -> BPETokenizer:
    """The bytes alone; a few tokens, some of them halves of characters; GPT-2's."""
    return (
        load_gpt2_tokenizer("")
        if name == "gpt2"
        else BPETokenizer.learn(["🙂🙃🙁😀 ééèê Zoë\n\n" * 20], {"bytes": 257, "bpe": 275}[name])
    )


@pytest.fixture(params=["bytes", "bpe", "gpt2"])
def subwords(request) -> BPETokenizer:
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return vocabulary(request.param)


TEXTS = st.lists(
    st.text(max_size=4) | st.sampled_from(["🙂", "😀", "é", "\ufffd", "Zoë", "👩‍👩‍👧", " "]), max_size=12
).map("".join)
# The fixture that hypothesis complains of does not change from one example to the next.
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@PROPERTY
@given(prompt=TEXTS, new=TEXTS)
def test_a_sample_never_shows_half_a_character(subwords, prompt, new):
    """At any time what is shown is a beginning of the text; U+FFFD for a half would not be. In the end it is all there."""
    shown = ""
    for piece in pieces(subwords, subwords.encode(prompt).tolist(), subwords.encode(new).tolist()):
        shown += piece
        assert new.startswith(shown)
    assert shown == new


@PROPERTY
@given(data=st.data())
def test_a_sample_of_any_ids_is_what_they_decode_to(subwords, data):
    """A model that has learned nothing yet draws halves of characters that never become whole."""
    prompt = subwords.encode(data.draw(TEXTS)).tolist()
    byte = st.integers(0, 255).map(lambda i: subwords.tokens.index(bytes([i])))
    new = data.draw(st.lists(byte | st.integers(0, subwords.vocab_size - 1)))
    assert subwords.decode(prompt) + "".join(pieces(subwords, prompt, new)) == subwords.decode(prompt + new)


def test_characters_are_shown_as_soon_as_they_are_whole():
    """By hand: the smiley's four bytes one by one, and a half at the end, which nothing completes."""
    tokenizer = vocabulary("bytes")
    new = [tokenizer.tokens.index(bytes([byte])) for byte in b"a" + "🙂".encode() + b"b" + "é".encode()[:1]]
    assert pieces(tokenizer, [], new) == ["a", "🙂", "b", "\ufffd"]
