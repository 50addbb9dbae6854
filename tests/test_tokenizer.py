"""Characters <-> ids."""

import json

import numpy as np
import pytest

from gptlab.tokenizer import CharTokenizer, from_state

TEXT = "Zoë said: “naïve” 🙂\n\ttwice 🙂\u2028"


def test_round_trip_and_order():
    tokenizer = CharTokenizer.from_text(TEXT)
    assert tokenizer.chars == "".join(sorted(set(TEXT)))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.tolist() == [tokenizer.chars.index(char) for char in TEXT]


def test_state_is_json_and_restores():
    tokenizer = CharTokenizer.from_text(TEXT)
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.chars == tokenizer.chars


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_ids_take_the_smallest_type(size, dtype):
    tokenizer = CharTokenizer("".join(map(chr, range(size))))
    ids = tokenizer.encode(chr(size - 1))
    assert ids.dtype == dtype and ids[0] == size - 1


def test_bytes_per_token_are_utf8s():
    tokenizer = CharTokenizer("aë“🙂")
    assert tokenizer.token_bytes().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("char", ["b", "🙂", "\ud800", "\x00"])
def test_unknown_characters_are_named(char):
    with pytest.raises(ValueError, match="position 2") as error:
        CharTokenizer("ac").encode("ac" + char)
    assert repr(char) in str(error.value)


@pytest.mark.parametrize(("text", "start"), [("b\na\n", "\n"), ("ba", "a"), ("🙂", "🙂")])
def test_an_empty_prompt_has_a_first_token(text, start):
    """Sampling without a prompt would fail on a text without line breaks."""
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.start == start and len(tokenizer.encode(tokenizer.start)) == 1


@pytest.mark.parametrize("vocabulary", ["ab", "".join(map(chr, range(0x4E00, 0x4E00 + 5000)))])
def test_errors_are_short_and_printable_anywhere(vocabulary):
    """A terminal that can show neither the character nor the vocabulary still learns which one it is; and a
    vocabulary of thousands does not fill the screen."""
    with pytest.raises(ValueError) as error:
        CharTokenizer(vocabulary).encode(vocabulary[0] + "é")
    text = str(error.value)
    assert "U+00E9" in text and "position 1" in text and str(len(vocabulary)) in text
    assert len(text) < 400 and "U+00E9" in text.encode("ascii", "replace").decode()
    assert ("and 4900 more" in text) == (len(vocabulary) == 5000)


def test_a_lone_surrogate_is_called_what_it_is():
    """What Python makes of b"caf\\xe9" on the command line; named as any other character, nobody would understand it."""
    with pytest.raises(ValueError, match=r"position 3\).*surrogate.*not UTF-8") as error:
        CharTokenizer("acf").encode(b"caf\xe9".decode("utf-8", "surrogateescape"))
    str(error.value).encode("utf-8")  # no surrogate in the message itself


@pytest.mark.parametrize("state", [None, {}, {"type": "bpe"}, {"type": "char"}, {"type": "char", "chars": ""},
                                   {"type": "char", "chars": "aa"}, {"type": "char", "chars": ["a", "b"]}])  # fmt: skip
def test_foreign_states_are_refused(state):
    with pytest.raises(ValueError):
        from_state(state)
