"""Where byte-pair vocabularies come from: GPT-2's by download, others learned from a text."""

import hashlib
import http.client
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gptlab.config import MAX_VOCAB_SIZE
from gptlab.data.files import download
from gptlab.tokenizer import BPETokenizer, whole_words

# OpenAI's files of GPT-2, and their SHA-256.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def gpt2() -> BPETokenizer:
    """GPT-2's 50,257 tokens. Its two files are fetched once, into tiktoken's cache, where tiktoken reads them: its own
    download knows no timeout.

    Raises:
        FileNotFoundError: they are not there and cannot be fetched; the text says where to put them.
    """
    import tiktoken

    folder = next((os.environ[key] for key in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR") if key in os.environ), None)
    if folder == "":
        raise ValueError(
            "TIKTOKEN_CACHE_DIR is empty, which turns tiktoken's cache off: set it to a folder, or unset it"
        )
    cache = Path(folder or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
    for name, sha256 in GPT2_FILES.items():
        file = cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()  # tiktoken's name for it
        try:
            download(GPT2_URL + name, sha256, file)
        except (OSError, http.client.HTTPException) as error:
            raise FileNotFoundError(
                f"GPT-2's vocabulary is not here and cannot be downloaded ({error}). Fetch {GPT2_URL}{name} where there "
                f"is a network and put it at {file} (TIKTOKEN_CACHE_DIR names another folder); its SHA-256 is "
                f"{sha256}. So with {' and '.join(GPT2_FILES)}. Without a download, a vocabulary is "
                "learned from the text itself: data.tokenizer=bpe data.vocab_size=1024"
            ) from None
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    return BPETokenizer(sorted(ranks, key=ranks.get))


def learn(pieces: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of `vocab_size` tokens, the end of text included, learned from a text that comes in pieces
    (Sennrich et al. 2016), by Hugging Face's tokenizers. The same text gives the same tokens.

    Raises:
        ValueError: a vocabulary too small for the bytes, absurdly large, or larger than the text allows.
    """
    if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size}: it must be 257 (bytes and end of text) to {MAX_VOCAB_SIZE:,}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, it would warn of worker processes started later
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(whole_words(pieces), trainer)
    ids = tokenizer.get_vocab()
    if len(ids) + 1 < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the text yields no more than {len(ids) + 1} tokens; take at most that many"
        )
    byte_of = _byte_of_character()
    return BPETokenizer([bytes(byte_of[char] for char in token) for token in sorted(ids, key=ids.get)])


def _byte_of_character() -> dict[str, int]:
    """GPT-2's writing of bytes as visible characters: themselves where they are visible, else those from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
