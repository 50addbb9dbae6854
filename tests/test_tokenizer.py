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


@pytest.mark.parametrize("state", [None, {}, {"type": "bpe"}, {"type": "char"}, {"type": "char", "chars": ""},
                                   {"type": "char", "chars": "aa"}, {"type": "char", "chars": ["a", "b"]}])  # fmt: skip
def test_foreign_states_are_refused(state):
    with pytest.raises(ValueError):
        from_state(state)
