"""Damaged and foreign input: one clean error or something that works, never anything else."""

import base64
import json
import random
from collections.abc import Iterator

import numpy as np
import pytest

from gptlab.data.files import python_docs
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer, from_state

SEED = 4
TEXT = "Zoë said: “naïve” 🙂\n\ttwice  <|endoftext|> a1b22\u2028"


def mutated_states(rng: random.Random, count: int) -> Iterator[str]:
    """JSON of valid states, most of them with one to three small changes: in the JSON itself, in the characters, or in
    a token."""
    states = [
        CharTokenizer.from_text(TEXT).state(),
        CharTokenizer("0123456789").state(),
        BPETokenizer.learn([python_docs()[:5000]], 257).state(),
        BPETokenizer.learn([python_docs()[:5000]], 300).state(),
    ]
    for _ in range(count):
        state = dict(rng.choice(states))
        kind = rng.randrange(3)
        if kind == 1:
            change_value(rng, state)
        if kind == 2 and "tokens" in state:
            change_token(rng, state)
        text = json.dumps(state, ensure_ascii=rng.random() < 0.5)
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                text = change(rng, text, '{}[]":,\\ue0+/= aA\ud800\xff')
        yield text


def change_value(rng: random.Random, state: dict) -> None:
    key = rng.choice(list(state))
    if rng.random() < 0.8:
        for _ in range(rng.randint(1, 3)):
            state[key] = change(rng, state[key], "aZ0+/= \n\t\0\xff🙂\ud800\udc00")
    elif rng.random() < 0.5:
        state[key] = random_json(rng, 2)
    else:
        del state[key]


def change(rng: random.Random, text: str, alphabet: str) -> str:
    """One character more, less or another, or a part taken out, repeated or moved."""
    at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    return rng.choice(
        [
            text[:at] + rng.choice(alphabet) + text[at:],
            text[:at] + text[at + 1 :],
            text[:at] + rng.choice(alphabet) + text[at + 1 :],
            text[:at] + text[end:],
            text[:end] + text[at:],
            text[at:] + text[:at],
        ]
    )


def change_token(rng: random.Random, state: dict) -> None:
    """The base64 stays valid; tokens may come to lack a byte, be there twice, empty, long, or in another order."""
    tokens = [base64.b64decode(token) for token in state["tokens"].split(" ")]
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(tokens)), rng.randrange(len(tokens))
        new = rng.choice([b"", b"<|endoftext|>", rng.randbytes(rng.randint(1, 3)), tokens[j], tokens[i] * 100])
        step = rng.randrange(4)
        if step == 0:
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif step == 1:
            tokens[i] = new
        elif step == 2:
            tokens.insert(i, new)
        else:
            del tokens[i]
    state["tokens"] = " ".join(base64.b64encode(token).decode() for token in tokens)


def random_json(rng: random.Random, depth: int):
    """Any value, objects often with a state's own keys."""
    kind = rng.randrange(8 if depth else 6)
    if kind == 6:
        return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        keys = rng.sample(["type", "chars", "tokens", "_target_", "", "a"], rng.randrange(5))
        return {key: random_json(rng, depth - 1) for key in keys}
    return [
        None,
        rng.choice([True, False]),
        rng.choice([0, -1, 7, 2**70, 1.5, -0.0, 1e300, float("inf"), float("nan")]),
        rng.choice(["char", "bpe", "gpt2", "", "YQ==", "YQ== Yg=="]),
        "".join(map(chr, rng.choices([*range(128), *range(0xD7F0, 0xD810), 0x1F642], k=rng.randrange(12)))),
        base64.b64encode(rng.randbytes(rng.randrange(12))).decode(),
    ][kind]


def random_states(rng: random.Random, count: int) -> Iterator[str]:
    for i in range(count):
        value = random_json(rng, 3)
        if i % 2:  # half of them are objects with a known type
            value = {"type": rng.choice(["char", "bpe"]), **{rng.choice(["chars", "tokens"]): value}}
        yield json.dumps(value)


@pytest.mark.parametrize("states", [mutated_states, random_states])
def test_tokenizer_states(states):
    """More than 10,000 in all. Some of each kind are accepted: else most of the assertions would say nothing."""
    rng = random.Random(SEED)
    accepted, refused = {"char": 0, "bpe": 0}, 0
    for i, text in enumerate(states(rng, 7000)):
        where = f"seed {SEED}, state {i}: {text[:300]!r}"
        try:
            state = json.loads(text)
        except json.JSONDecodeError:  # no state, and not counted as one
            continue
        try:
            tokenizer = from_state(state)
        except ValueError as error:
            assert type(error) is UserError and str(error), where
            refused += 1
            continue
        except BaseException as error:  # tiktoken's crashes are no Exception
            pytest.fail(f"{type(error).__name__}: {error}; {where}")
        accepted[state["type"]] += 1
        assert_consistent(tokenizer, state, rng, where)
    assert refused + sum(accepted.values()) > 5000 and refused > 1000 and accepted["char"] > 100
    assert states is random_states or accepted["bpe"] > 200


def assert_consistent(tokenizer, state, rng: random.Random, where: str) -> None:
    size = tokenizer.vocab_size
    ids = [rng.randrange(size) for _ in range(20)]
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (size,) and sizes.dtype.kind in "iu" and sizes.min() >= 0, where
    assert isinstance(tokenizer.decode([*ids, -1, size, 2**70]), str), where
    text = tokenizer.decode(ids) if state["type"] == "char" else TEXT
    encoded = tokenizer.encode(text)
    assert isinstance(encoded, np.ndarray) and encoded.max() < size, where
    assert tokenizer.decode(encoded.tolist()) == text, where
    assert sizes[encoded].sum() == len(text.encode("utf-8", "surrogatepass")), where
    assert len(tokenizer.encode(tokenizer.start)) > 0, where
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.vocab_size == size and again.decode(ids) == tokenizer.decode(ids), where
