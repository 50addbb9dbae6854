"""tokenizer.json: Hugging Face's `tokenizers` gives the ids that gptlab gives; files of others give the same or are refused."""

import copy
import functools
import hashlib
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import DIGITS, FRAGMENTS, MAKE, PROPERTY, TEXTS, gpt2, kind, learned  # noqa: F401
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gptlab.data.files import GPT2_URL
from gptlab.errors import UserError
from gptlab.tokenizer import BPETokenizer, CharTokenizer
from gptlab.tokenizer_json import CHARACTER_OF, find_merges, from_json, to_json

END = "<|endoftext|>"
ODD = "a b\n\r\t\0<>|\\\"'[]unk\x85\u200b\u2028\ufeff\ufffd\u0301éΣ漢🙂\U0010ffff"
BYTES = [bytes([i]) for i in range(256)]


@functools.lru_cache(maxsize=8)  # GPT-2's takes a second
def written(tokenizer: Any) -> str:
    return json.dumps(to_json(tokenizer), ensure_ascii=False)


@functools.lru_cache(maxsize=8)
def judge(tokenizer: Any) -> Tokenizer:
    return Tokenizer.from_str(written(tokenizer))


def assert_same(tokenizer: Any, text: str) -> None:
    theirs = judge(tokenizer)
    ids = theirs.encode(text).ids
    assert ids == tokenizer.encode(text).tolist()
    assert theirs.decode(ids) == text


@settings(PROPERTY, max_examples=50)
@given(data=st.data())
def test_any_text_has_the_same_ids_and_comes_back(kind, data):  # noqa: F811
    make, texts = kind
    text = data.draw(texts.map(lambda text: text.replace(END, "<|end")))
    assert_same(make(text), text)


@pytest.mark.parametrize("chars", [DIGITS, ODD, "".join(reversed(ODD)), "\n", "🙂"])
def test_every_character(chars):
    tokenizer = CharTokenizer(chars)
    assert judge(tokenizer).get_vocab_size() == len(chars)
    assert_same(tokenizer, chars + chars[::-1] + 3 * chars[0])
    with pytest.raises(Exception, match=r"Missing .UNK. token"):
        judge(tokenizer).encode(chars + "λ")


def test_the_end_of_a_text(gpt2_files):
    """Written as a special token, which is what Hugging Face finds in a text; gptlab writes it between documents."""
    for tokenizer in (learned(), gpt2()):
        theirs = judge(tokenizer)
        assert theirs.get_vocab_size() == tokenizer.vocab_size
        assert theirs.encode(f"a{END}b").ids[1] == theirs.token_to_id(END) == tokenizer.end_of_text
        assert tokenizer.end_of_text not in tokenizer.encode(f"a{END}b")
        theirs.encode_special_tokens = True
        assert theirs.encode(f"a{END}b").ids == tokenizer.encode(f"a{END}b").tolist()
        assert theirs.decode([tokenizer.end_of_text], skip_special_tokens=False) == END


@pytest.mark.slow
def test_every_code_point(gpt2_files):
    """Two libraries, two tables of what is a letter, a number or whitespace."""
    theirs = judge(gpt2())
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, sys.maxunicode + 1, 101)]  # mostly unassigned
    for code in codes:
        text = f"a{chr(code)}b 1{chr(code)}2{chr(code)} {chr(code)} !{chr(code)}?{2 * chr(code)}"
        assert theirs.encode(text).ids == gpt2().encode(text).tolist(), hex(code)


def gpt2_file(folder: str) -> dict[str, Any]:
    """GPT-2's tokenizer.json as the hub has it, made of OpenAI's two files."""
    vocab, merges = (Path(folder, hashlib.sha1((GPT2_URL + name).encode()).hexdigest()).read_text("utf-8")
                     for name in ("encoder.json", "vocab.bpe"))  # fmt: skip
    special = {"id": 50256, "special": True, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}  # fmt: skip
    part = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": part, "decoder": {**part, "add_prefix_space": True},
        "post_processor": {**part, "add_prefix_space": True, "trim_offsets": False},
        "model": {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "vocab": json.loads(vocab), "merges": merges.split("\n")[1:-1]},
    }  # fmt: skip


def test_gpt2s_own_file(gpt2_files):
    """Vocabulary and merges as OpenAI wrote them, of which gptlab has the vocabulary alone; within seconds."""
    ours, file = json.loads(written(gpt2()))["model"], gpt2_file(gpt2_files)
    assert ours["vocab"] == file["model"]["vocab"]
    assert [" ".join(pair) for pair in ours["merges"]] == file["model"]["merges"]
    started = time.process_time()
    assert from_json(file).tokens == gpt2().tokens
    assert time.process_time() - started < 8


def test_merges_are_those_that_were_learned():
    text = " ".join(FRAGMENTS) + (" ababab aababb " * 3 + "aaaaaaa " + "ééèê🙂🙃") * 9
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=339, initial_alphabet=alphabet, show_progress=False)
    )
    ours = to_json(BPETokenizer.learn([text], 340))
    assert len(ours["model"]["merges"]) > 80
    assert ours["model"]["merges"] == json.loads(trained.to_str())["model"]["merges"]


def encode_slowly(tokens: list[bytes]) -> list[tuple[int, int]] | None:
    """`find_merges` by encoding each token in the plainest way; None for a vocabulary that it refuses."""
    id_of, merges = {token: i for i, token in enumerate(tokens)}, []
    for i, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            lowest, at = min((id_of.get(a + b, i), at) for at, (a, b) in enumerate(itertools.pairwise(parts)))
            if lowest >= i:
                return None
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(tuple(id_of[part] for part in parts))
            if any(len(part) > 1 and id_of[part] > i for part in parts):
                return None
    return merges


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_merges_of_any_vocabulary(count):
    """Of few letters, so that most tokens could be merged in several ways; a third in a wrong order or with gaps."""
    rng, refused = random.Random(count), 0
    for _ in range(count):
        tokens = BYTES[97 : 98 + rng.randrange(3)]
        for _ in range(rng.randint(1, 9)):
            token = rng.choice(tokens) + rng.choice(tokens)
            tokens += [token] if token not in tokens else []
        if rng.random() < 0.2:
            rng.shuffle(tokens)
        if rng.random() < 0.2:
            tokens.remove(rng.choice([token for token in tokens if len(token) > 1]))
        expected = encode_slowly(tokens)
        try:
            assert find_merges(tokens) == expected, tokens
        except UserError:
            assert expected is None, tokens
            refused += 1
    assert 0.1 < refused / count < 0.5


class Custom(CharTokenizer):
    pass


@pytest.mark.parametrize(
    "tokenizer, text",
    [
        (Custom("ab"), "Custom is a custom tokenizer"),
        (BPETokenizer([*BYTES, b"abc"]), "token 256, b'abc', is not two earlier tokens"),
        (BPETokenizer([*BYTES, b"abc", b"ab"]), "token 256, b'abc', is not two earlier tokens"),
        (BPETokenizer([*BYTES, b"bc", b"ab", b"abc", b"abcd"]), None),
        (BPETokenizer([*BYTES, b"ab", b"bc", b"bcd", b"abcd"]), "token 259, b'abcd', is not two earlier"),
        (BPETokenizer([*BYTES, END.encode()]), f"{END} is a token of text"),
    ],
)
def test_what_a_tokenizer_json_cannot_express(tokenizer, text):
    if text is None:
        return assert_same(tokenizer, "abcdabc")
    with pytest.raises(UserError) as error:
        to_json(tokenizer)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(ODD), CharTokenizer(DIGITS), learned()], ids=["odd", "digits", "bpe"]
)
def test_files_come_back(tokenizer):
    """Also as `tokenizers` writes them, and with what it adds for batches."""
    for value in (to_json(tokenizer), json.loads(judge(tokenizer).to_str())):
        template = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        }
        for changes in ({}, {"post_processor": template}, {"truncation": {"max_length": 8}, "padding": {"pad_id": 0}}):
            assert from_json({**value, **changes}).state() == tokenizer.state()


def changed(value: dict[str, Any], at: str, new: Any) -> dict[str, Any]:
    value = copy.deepcopy(value)
    node = value
    *keys, last = at.split("/")
    for key in keys:
        node = node[int(key) if isinstance(node, list) else key]
    node[last] = new(node[last]) if callable(new) else new
    return value


@functools.cache
def files() -> dict[str, dict[str, Any]]:
    return {"char": to_json(CharTokenizer("ab\n")), "bpe": to_json(learned())}


BERT = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": END}}, {"Sequence": {"id": "A"}}]}


@pytest.mark.parametrize(
    "of, at, new, text",
    [
        ("char", "normalizer", {"type": "Lowercase"}, "normalizer must be as"),
        ("char", "pre_tokenizer/pattern", {"Regex": "."}, "pre_tokenizer must be as"),
        ("char", "decoder", None, "decoder must be as"),
        ("char", "model/unk_token", "a", "model.unk_token must be as"),
        ("char", "model/vocab", {"a": 0, "b": 2}, "the ids of its 2 tokens must be 0 to 1, each once"),
        ("char", "model/vocab", {"a": 0, "b": 0}, "the ids of its 2 tokens must be 0 to 1, each once"),
        ("char", "model/vocab", {"a": 0, "bc": 1}, "model.vocab must be as"),
        ("char", "model/vocab", {}, "a character vocabulary must be"),
        ("char", "model/vocab", {"\ud800": 0}, "no lone surrogates"),
        ("char", "model/vocab", {"a": "0"}, "the ids of its 1 tokens"),
        ("char", "model/vocab", {"a": None, "b": 1}, "of another kind, or damaged (TypeError"),
        ("char", "model/vocab", ["a"], "of another kind, or damaged (AttributeError"),
        ("char", "model/type", "Unigram", "model.type='Unigram' must be WordLevel (of characters) or BPE"),
        ("char", "added_tokens", [{"id": 3, "content": "<pad>"}], "added_tokens must be as"),
        ("bpe", "model/merges", lambda merges: merges[::-1], "model.merges must be as"),
        ("bpe", "model/merges", lambda merges: merges[:-1], "model.merges must be as"),
        ("bpe", "model/merges", lambda merges: [[a, b] for b, a in merges], "model.merges must be as"),
        ("bpe", "model/merges", None, "model.merges must be as"),
        ("bpe", "model/dropout", 0.1, "model.dropout must be as"),
        ("bpe", "model/ignore_merges", True, "model.ignore_merges must be as"),
        ("bpe", "model/continuing_subword_prefix", "##", "model.continuing_subword_prefix must be as"),
        ("bpe", "model/vocab", lambda vocab: {**vocab, END: 0, "!": 299}, "a BPE vocabulary must have every single byte"),
        ("bpe", "model/vocab", lambda vocab: {**vocab, "漢": 300}, "is a token of text"),
        ("bpe", "model/vocab", lambda vocab: {**vocab, "漢": 300, "b": 301}, "each once"),
        ("bpe", "model/vocab", lambda vocab: {**vocab, "x" * 5000: 300}, "no token may have more than 1024 bytes"),
        ("bpe", "pre_tokenizer/add_prefix_space", True, "pre_tokenizer must be as"),
        ("bpe", "pre_tokenizer/use_regex", False, "pre_tokenizer must be as"),
        ("bpe", "pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "pre_tokenizer must be as"),
        ("bpe", "post_processor", BERT, "post_processor must be as"),
        ("bpe", "added_tokens", [], "added_tokens must be as"),
        ("bpe", "added_tokens", lambda tokens: [*tokens, {"id": 300, "content": "<pad>"}], "added_tokens must be as"),
        ("bpe", "added_tokens", None, "of another kind, or damaged (TypeError"),
        ("bpe", "model", [], "of another kind, or damaged (AttributeError"),
        ("bpe", "decoder", {"type": "WordPiece"}, "decoder must be as"),
    ],
)  # fmt: skip
def test_a_file_with_other_ids(of, at, new, text):
    with pytest.raises(UserError, match=r"^tokenizer\.json: ") as error:
        from_json(changed(files()[of], at, new))
    assert text in str(error.value)


VALUES = [None, True, False, 0, 1, -1, 300, 1.5, float("nan"), 10**30, "", "a", "BPE", "WordLevel", "ByteLevel", "\ud800", [], {}, [[]], ["a", "b"], {"type": "ByteLevel"}]  # fmt: skip


def mutate(rng: random.Random, value: Any) -> Any:
    """The value, changed in place somewhere."""
    while True:
        keys = [*range(len(value))] if isinstance(value, list) else [*value]
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        other = rng.choice(keys)
        match rng.randrange(5):
            case 0:
                value[key] = rng.choice(VALUES)
            case 1:
                del value[key]
            case 2:
                value[key], value[other] = value[other], value[key]
            case 3 if isinstance(value, dict):
                value[rng.choice(["", "a", "Ġa", "漢", "type", key[::-1], key + other])] = value[other]
            case _:
                value[key] = copy.deepcopy(value[other])
        return


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_files(count):
    """A tokenizer with the ids of the file, or one UserError, at once."""
    small = BPETokenizer([*BYTES, b"th", b"the", b" t", b" the", b"\n\n", b"\n\n\n\n"])
    originals = [to_json(CharTokenizer(ODD)), to_json(small)]
    rng, accepted = random.Random(count), 0
    for _ in range(count):
        value = copy.deepcopy(rng.choice(originals))
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate(rng, value)
        started = time.process_time()
        try:
            tokenizer = from_json(value)
        except UserError as error:
            assert 20 < len(str(error)) < 500
        else:
            accepted += 1
            text = (
                ODD.replace("a", tokenizer.decode(range(tokenizer.vocab_size - 2)))
                if isinstance(tokenizer, BPETokenizer)
                else tokenizer.chars
            )
            assert judge_file(value, text) in (None, tokenizer.encode(text).tolist())
        assert time.process_time() - started < 1
    assert 0.02 < accepted / count < 0.6


def judge_file(value: dict[str, Any], text: str) -> list[int] | None:
    """The ids of such a file; None if `tokenizers` does not read it."""
    try:
        return Tokenizer.from_str(json.dumps({**value, "truncation": None, "padding": None})).encode(text).ids
    except Exception as error:
        assert type(error) is Exception  # what it raises for all that it cannot read
        return None


def test_character_names_are_those_of_the_byte_alphabet():
    assert {*CHARACTER_OF.values()} == {*pre_tokenizers.ByteLevel.alphabet()}
