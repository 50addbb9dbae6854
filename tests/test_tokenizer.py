"""Characters <-> ids, subwords <-> ids: round trips, states, places of what cannot be encoded, and learned vocabularies."""

import base64
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptlab.data.files import load_gpt2_tokenizer, python_docs
from gptlab.errors import UserError
from gptlab.tokenizer import MAX_VOCAB_SIZE, BPETokenizer, CharTokenizer, align_to_words, from_state

TEXT = "Zoë said: “naïve” 🙂\n\ttwice 🙂\u2028"


def test_round_trip_and_order():
    tokenizer = CharTokenizer.from_text(TEXT)
    assert tokenizer.chars == "".join(sorted(set(TEXT)))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.tolist() == [tokenizer.chars.index(char) for char in TEXT]
    assert CharTokenizer("aë“🙂").token_bytes().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("text", "start"), [("b\na\n", "\n"), ("ba", "a"), ("🙂", "🙂")])
def test_an_empty_prompt_has_a_first_token(text, start):
    """Sampling without a prompt would fail on a text without newlines."""
    assert CharTokenizer.from_text(text).start == start


@pytest.mark.parametrize("vocabulary", ["ab", "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))])
def test_errors_are_short_and_printable_anywhere(vocabulary):
    """A terminal that can show neither the character nor the vocabulary still learns which one it is; and a
    vocabulary of thousands does not fill the screen."""
    with pytest.raises(UserError) as error:
        CharTokenizer(vocabulary).encode(vocabulary[0] + "é")
    text = str(error.value)
    assert "U+00E9" in text and "position 1" in text and str(len(vocabulary)) in text
    assert len(text) < 400 and "U+00E9" in text.encode("ascii", "replace").decode()


# What tokens are cut at, and what only one of Python, Rust and Hugging Face may take for whitespace, beside anything else.
FRAGMENTS = ["a", "the", " the", "'s", "'ll", "don't", "12", "½", "é", "e\u0301", "🙂", "👩‍👩‍👧", "“", "=", " ", "  ", "\t", "\n", "\r\n",
             "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\0", "\ufffd", "\ufeff", "<|endoftext|>"]  # fmt: skip
FRAGMENT_TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
TEXTS = (
    st.text() | FRAGMENT_TEXTS | st.lists(st.text(max_size=5) | st.sampled_from(FRAGMENTS), max_size=10).map("".join)
)
DIGITS = "0123456789"
# The fixtures that hypothesis complains of do not change from one example to the next.
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@functools.cache
def learned() -> BPETokenizer:
    """A small vocabulary with tokens that begin with a space, runs of whitespace, and halves of characters."""
    return BPETokenizer.learn([" ".join(FRAGMENTS * 3), "🙂🙃🙁😀 ééèê\n\n\n    x\t\t" * 20], 300)


@functools.cache
def gpt2() -> BPETokenizer:
    return load_gpt2_tokenizer("")


MAKE = {
    "char": lambda text: CharTokenizer.from_text(text or "a"),
    "digits": lambda text: CharTokenizer(DIGITS),
    "bpe": lambda text: learned(),
    "gpt2": lambda text: gpt2(),
}


@pytest.fixture(params=MAKE)
def kind(request):
    """What makes a tokenizer for a text, and the texts that such a tokenizer is for."""
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return MAKE[request.param], st.text(DIGITS) if request.param == "digits" else TEXTS


@pytest.fixture(params=["bpe", "gpt2"])
def subwords(request) -> BPETokenizer:
    if request.param == "gpt2":
        request.getfixturevalue("gpt2_files")
    return MAKE[request.param]("")


@PROPERTY
@given(data=st.data())
def test_any_text_comes_back_and_its_bytes_are_counted(kind, data):
    """Bits per byte are right only if the bytes of a text's tokens are the bytes of the text."""
    make, texts = kind
    text = data.draw(texts)
    tokenizer = make(text)
    ids = tokenizer.encode(text)
    assert ids.ndim == 1 and ids.dtype == np.min_scalar_type(tokenizer.vocab_size - 1)
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(ids) == text
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) and sizes[ids].sum() == len(text.encode())


@PROPERTY
@given(data=st.data())
def test_a_state_is_json_and_the_same_tokenizer(kind, data):
    make, texts = kind
    text = data.draw(texts)
    tokenizer = make(text)
    again = _restored(tokenizer)
    assert again.vocab_size == tokenizer.vocab_size
    assert type(again) is type(tokenizer) and again.start == tokenizer.start
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.token_bytes().tolist() == tokenizer.token_bytes().tolist()


@functools.lru_cache(maxsize=2)  # GPT-2's takes a tenth of a second
def _restored(tokenizer):
    state = tokenizer.state()
    again = from_state(json.loads(json.dumps(state)))
    assert again.state() == state
    everything = range(tokenizer.vocab_size)
    assert again.decode(everything) == tokenizer.decode(everything)
    return again


@PROPERTY
@given(data=st.data())
def test_any_ids_decode(kind, data):
    """A model may write any of its ids, halves of characters in any order; other ids, from anywhere, are U+FFFD."""
    tokenizer = kind[0]("aé€🙂")
    known = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(known | st.integers() | st.integers(-2, tokenizer.vocab_size + 1)))
    text = tokenizer.decode(ids)
    assert isinstance(text, str)
    text.encode("utf-8")  # nothing in it that could not be printed
    if any(not 0 <= i < tokenizer.vocab_size for i in ids):
        assert "\ufffd" in text


@PROPERTY
@given(data=st.data(), surrogate=st.characters(categories=["Cs"]))
def test_a_lone_surrogate_is_refused_with_its_place(kind, data, surrogate):
    """The first of them, also where another character stands in for it or a pair of them would make a smiley."""
    make, texts = kind
    before, after = data.draw(texts), data.draw(texts)
    tokenizer = make(before + after)
    for text in (before + surrogate + after, before + surrogate + "\udc00\ud83d" + after + surrogate):
        with pytest.raises(UserError, match=rf"\(at position {len(before)}\) is a lone surrogate") as error:
            tokenizer.encode(text)
        assert type(error.value) is UserError  # not a UnicodeEncodeError, whose message says less
        str(error.value).encode("utf-8")


@PROPERTY
@given(text=TEXTS, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_pieces_aligned_to_words_can_be_encoded_one_by_one(subwords, text, cuts):
    """Cut behind the space, or within a word, a piece would end or begin with other tokens than the whole."""
    pieces = [text[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), None], strict=True)]
    words = list(align_to_words(pieces))
    assert "".join(words) == text
    ids = [i for word in words for i in subwords.encode(word).tolist()]
    assert ids == subwords.encode(text).tolist()


def test_pieces_are_passed_on_as_soon_as_they_end_with_a_word():
    """By hand. Held back until the end, the pieces of a large file would fill the memory."""
    assert list(align_to_words(["one two", " three", "four five"])) == ["one", " two threefour", " five"]
    assert list(align_to_words(["one", " ", "two"])) == ["one two"]
    assert list(align_to_words(["a\n\n", "b c\r\n", "", "d"])) == ["a", "\n\nb c", "\r\nd"]
    assert list(align_to_words([])) == list(align_to_words([""])) == []


@PROPERTY
@given(text=TEXTS)
def test_gpt2s_ids_are_tiktokens(gpt2_files, text):
    assert gpt2().vocab_size == _tiktoken().n_vocab and gpt2().end_of_text == _tiktoken().eot_token
    assert gpt2().encode(text).tolist() == _tiktoken().encode_ordinary(text)


@functools.cache
def _tiktoken():
    return tiktoken.get_encoding("gpt2")


def test_end_of_text_in_a_text_is_text(subwords):
    """Taken for the id between documents, a text could end the document that it stands in."""
    ids = subwords.encode("a<|endoftext|>b")
    assert subwords.end_of_text == subwords.vocab_size - 1 and subwords.end_of_text not in ids
    assert subwords.decode(ids) == "a<|endoftext|>b"
    assert subwords.decode([subwords.end_of_text]) == "<|endoftext|>"
    assert subwords.token_bytes()[subwords.end_of_text] == 0


@pytest.mark.parametrize("text", [" ", "\n", "\x1c", "a", "é"])
def test_a_million_of_the_same(subwords, text):
    """tiktoken itself crashes at a million spaces before a word."""
    text = "word" + text * 1_000_000 + "word"
    ids = subwords.encode(text)
    assert subwords.decode(ids) == text and subwords.token_bytes()[ids].sum() == len(text.encode())


def bpe_state(*changes: bytes) -> dict:
    """The 256 bytes and further tokens; `b"old>new"` replaces one of them."""
    tokens = [bytes([i]) for i in range(256)]
    for change in changes:
        old, _, new = change.rpartition(b">")
        tokens = [new if token == old else token for token in tokens] if old else [*tokens, new]
    return {"type": "bpe", "tokens": " ".join(base64.b64encode(token).decode() for token in tokens)}


def test_the_smallest_bpe_state():
    """The states below are refused for what they change in this one."""
    assert from_state(bpe_state(b"ab", b"c>abc", b"abc>c")).tokens[256] == b"ab"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "unknown tokenizer"),
        ([], "unknown tokenizer"),
        ({"type": ["bpe"]}, "unknown tokenizer"),
        ({"type": "BPE"}, "unknown tokenizer; known: char, bpe"),
        ({"type": "char"}, "must be a string of characters, none twice"),
        ({"type": "char", "chars": ""}, "must be a string"),
        ({"type": "char", "chars": "aba"}, "none twice"),
        ({"type": "char", "chars": "a\ud800"}, "lone surrogates"),
        ({"type": "char", "chars": ["a", "b"]}, "must be a string"),
        ({"type": "bpe"}, "unknown tokenizer; known: .*tokens in base64"),
        ({"type": "bpe", "tokens": ["YQ=="]}, "tokens in base64"),
        ({"type": "bpe", "tokens": ""}, "none empty"),
        ({"type": "bpe", "tokens": "YQ== YQ"}, "damaged: Incorrect padding"),
        ({"type": "bpe", "tokens": "YQ== \ud800"}, "damaged: .*ASCII"),
        (bpe_state(b"ab", b"cd", b"ab"), "none twice"),
        (bpe_state(b"a>ab"), "must have every single byte, and lacks b'a'"),
    ],
)
def test_each_foreign_state_is_refused_for_what_it_is(state, message):
    with pytest.raises(UserError, match=message):
        from_state(state)


def test_absurdly_large_states_are_refused():
    tokens = [bytes([i]) for i in range(256)] + [i.to_bytes(3, "big") for i in range(MAX_VOCAB_SIZE - 256)]
    text = " ".join(base64.b64encode(token).decode() for token in tokens)
    with pytest.raises(UserError, match="< 1,048,576 tokens"):
        from_state({"type": "bpe", "tokens": text})


@pytest.mark.parametrize("vocab_size", [257, 258, 300, 1024])
def test_a_learned_vocabulary_has_the_size_that_was_asked_for(vocab_size):
    tokenizer = BPETokenizer.learn([python_docs()[:100_000]], vocab_size)
    assert tokenizer.vocab_size == vocab_size == len(tokenizer.tokens) + 1
    assert set(tokenizer.tokens[:256]) == {bytes([i]) for i in range(256)}
    earlier = set(tokenizer.tokens[:256])
    for token in tokenizer.tokens[256:]:
        assert any({token[:i], token[i:]} <= earlier for i in range(1, len(token))), token
        earlier.add(token)
    if vocab_size == 1024:  # it is of use: half as many tokens as bytes, also on what was not learned from
        text = python_docs()[200_000:300_000]
        assert len(tokenizer.encode(text)) < 0.5 * len(text.encode())


def test_merges_by_hand():
    """The pairs of " xyz xyz xyz xy xy x y": " x" 6 times, "xy" 5, "yz" 3, " y" once; after the first merge " x"+"y" 5
    and "yz" 3; then " xy"+"z" 3 and " y" once; then " y" alone is left, and after it nothing."""
    text = " xyz xyz xyz xy xy x y"
    merges = [b" x", b" xy", b" xyz", b" y"]
    for count in range(5):
        assert BPETokenizer.learn([text], 257 + count).tokens[256:] == merges[:count]
    with pytest.raises(UserError, match="vocab_size=262 must be at most 261: the text yields no more"):
        BPETokenizer.learn([text], 262)


def test_the_same_text_gives_the_same_tokens():
    """In whatever pieces, and in another process with other hash seeds and another number of threads."""
    text = python_docs()[:50_000]
    learned = BPETokenizer.learn([text], 700)
    for size in (3, 50_000):
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        assert BPETokenizer.learn(pieces, 700).tokens == learned.tokens
    code = (
        "from gptlab.tokenizer import BPETokenizer; from gptlab.data.files import python_docs; "
        "print(BPETokenizer.learn([python_docs()[:50_000]], 700).state()['tokens'])"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "1"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == learned.state()["tokens"]
