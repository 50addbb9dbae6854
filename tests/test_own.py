"""Custom model, data set and tokenizer, from a folder that knows nothing of the package: train, sample, resume, sweep."""

import textwrap

import conftest
import numpy as np
import pytest
import torch
from conftest import pieces, same, weights
from torch.nn import functional as F

from gptlab.contracts import check_data, check_model, check_tokenizer
from gptlab.data.windows import WindowData
from gptlab.errors import UserError
from gptlab.tokenizer import CharTokenizer

TINY = [setting for setting in conftest.TINY if setting not in ("model=gpt-nano", "data.val_windows=20")]
OWN = ["--config-dir", "my_conf", "model=my_rnn", "data=my_data"]
FILES = {
    "my_model.py": """
        from torch import nn

        class MyRNN(nn.Module):
            def __init__(self, vocab_size, block_size, width):
                super().__init__()
                self.embed = nn.Embedding(vocab_size, width)
                self.rnn = nn.GRU(width, width, batch_first=True)
                self.head = nn.Linear(width, vocab_size)

            def forward(self, ids):  # (B, T) token ids
                hidden, _ = self.rnn(self.embed(ids))
                return self.head(hidden)  # (B, T, vocab_size) logits
    """,
    "my_data.py": """
        import numpy as np
        from gptlab.data.windows import WindowData
        from gptlab.tokenizer import CharTokenizer

        class MyData(WindowData):
            def __init__(self, letters, **windows):
                super().__init__(**windows)
                self.letters = letters

            def setup(self, stage=None):
                self.tokenizer = CharTokenizer(self.letters)
                ids = np.arange(2000) % len(self.letters)
                self.train_ids, self.val_ids = ids[:1800], ids[1800:]
                self.record = {"name": self.name, "sha256": "0"}
    """,
    "my_conf/model/my_rnn.yaml": "_target_: my_model.MyRNN\nwidth: 8\n",
    "my_conf/data/my_data.yaml": "_target_: my_data.MyData\nname: mine\nletters: abcd\nblock_size: 8\nbatch_size: 4\n",
}


@pytest.fixture
def own(tmp_path):
    """The files of the README's example, as a user has them."""
    for name, content in FILES.items():
        path = tmp_path / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return tmp_path / "elsewhere"


def test_train_sample_and_resume(gptlab, own):
    said = gptlab("train", *OWN, *TINY, "model.width=12", "hydra.run.dir=run", cwd=own).stdout
    assert "memory:" in said  # estimated for a custom model, too
    assert weights(own / "run")["model.embed.weight"].shape == (4, 12)

    refused = gptlab("train", *OWN, *TINY, "optim.head_lr=0.1", "hydra.run.dir=refused", cwd=own, status=2).stderr
    assert "optim.head_lr: a learning rate for matrices that the model lacks: head" in refused
    assert not (own / "refused/config.yaml").exists()
    refused = gptlab("sample", "ckpt=run", cwd=own, status=2).stderr
    assert "my_model.MyRNN" in refused and "trust=true" in refused and "Traceback" not in refused
    text = gptlab("sample", "ckpt=run", "trust=true", "prompt=abc", "max_new_tokens=7", cwd=own).stdout
    assert len(text) == len("abc") + 7 + len("\n") and set(text) <= set("abcd\n")
    (own / "away").mkdir()
    missing = gptlab("sample", "ckpt=../run", "trust=true", cwd=own / "away", status=2).stderr
    assert "cannot import it" in missing and "my_model" in missing

    gptlab("train", "resume=run", "trust=true", "trainer.max_steps=6", cwd=own)
    gptlab("train", *OWN, *TINY, "model.width=12", "trainer.max_steps=6", "hydra.run.dir=whole", cwd=own)
    assert same(weights(own / "run"), weights(own / "whole"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model._target_=my_model.MyRNM", "MyRNM"),
        ("model._target_=her_model.MyRNN", "her_model"),
        ("+model.depth=3", "vocab_size, block_size, width"),
    ],
)
def test_config_errors(gptlab, own, argument, said):
    stderr = gptlab("train", *OWN, *TINY, argument, cwd=own, status=2).stderr
    assert said in stderr and "Traceback" not in stderr and len(stderr.strip("\n").split("\n")) <= 6


def test_an_error_in_custom_code_keeps_its_traceback(gptlab, own):
    """It is no config error: status 1, and the line of their file."""
    stderr = gptlab("train", *OWN, *TINY, "model.width=-1", cwd=own, status=1).stderr
    assert "my_model.py" in stderr and "RuntimeError: Trying to create tensor with negative" in stderr


TOKENIZER = """
    from gptlab.tokenizer import CharTokenizer

    class Shouting:
        def __init__(self, letters, loud):
            self.letters, self.loud, self.inner = letters, loud, CharTokenizer("".join(letters))
            self.vocab_size, self.start, self.token_bytes = self.inner.vocab_size, letters[0], self.inner.token_bytes

        def encode(self, text):
            return self.inner.encode(text.lower())

        def decode(self, ids):
            return "".join(self.inner.chars[i].upper() + self.loud["mark"] for i in ids)

        def state(self):
            return {"_target_": "my_tokens.Shouting", "letters": self.letters, "loud": self.loud}
"""


def test_a_custom_tokenizer(gptlab, own):
    """Its state names its class; sampling builds that only when trusted, from plain values."""
    (own / "my_tokens.py").write_text(textwrap.dedent(TOKENIZER))
    data = (own / "my_data.py").read_text()
    mine = data.replace("CharTokenizer(self.letters)", "Shouting(list(self.letters), {'mark': '!'})")
    (own / "my_data.py").write_text("from my_tokens import Shouting\n" + mine)
    shown = gptlab(
        "train", *TINY, "--config-dir", "my_conf", "data=my_data", "model=gpt-nano", "hydra.run.dir=run", cwd=own
    )
    command = next(line.split() for line in shown.stdout.splitlines() if "gptlab.sample" in line)
    assert command[-1] == "trust=true"
    assert "my_tokens.Shouting" in gptlab("sample", "ckpt=run", cwd=own, status=2).stderr
    text = gptlab("sample", *command[3:], "prompt=AB", "max_new_tokens=2", cwd=own).stdout
    assert text.count("!") == 2 and set(text) <= set("ABCD!\n")


def test_nothing_in_a_checkpoint_is_interpolated(gptlab, own):
    """Were its config composed, the resolver would put the secret into the error, or the environment into the model."""
    gptlab("train", *TINY, "model=gpt-nano", "data.val_windows=5", "hydra.run.dir=run", cwd=own)
    path = own / "run/checkpoints/best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for key, value in (("n_layer", "${oc.env:SECRET}"), ("_target_", "${oc.env:SECRET}")):
        checkpoint["config"]["model"] |= {key: value}
        torch.save(checkpoint, own / "changed.ckpt")
        done = gptlab("sample", "ckpt=changed.ckpt", cwd=own, status=2, SECRET="hidden-value")
        assert "hidden-value" not in done.stdout + done.stderr and "Traceback" not in done.stderr


class Model(torch.nn.Module):
    """The embedding's row is the prediction; `change` is what the tests break."""

    vocab_size = 5

    def __init__(self, change=lambda logits: logits, block_size=4):
        super().__init__()
        self.table, self.change, self.block_size = torch.nn.Embedding(5, 5), change, block_size

    def forward(self, ids):
        return self.change(self.table(ids))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Model(lambda x: x + x.mean(dim=1, keepdim=True)), "looks ahead"),
        (Model(lambda x: x + F.pad(x[:, 1:], (0, 0, 0, 1))), "looks ahead"),  # by one token
        (Model(lambda x: x + x.mean(dim=0, keepdim=True)), "with other sequences"),
        (Model(lambda x: F.dropout(x, 0.5)), "random in eval mode"),
        (Model(lambda x: x * float("nan")), "not finite"),
        (Model(lambda x: x[:, -1]), r"returned \(2, 5\)"),
        (Model(lambda x: x[..., :4]), r"returned \(2, 4, 4\)"),
        (Model(lambda x: (x, None)), "returned tuple"),
        (Model().requires_grad_(False), "parameters to train"),
        (Model(block_size=8), "block_size=8 must be 4"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused(model, said):
    good, before = Model(lambda x: F.dropout(x, 0.5, good.training)), torch.get_rng_state()
    check_model(good, 5, 4)
    assert good.training and torch.equal(torch.get_rng_state(), before)  # trying a model changes nothing of the run
    with pytest.raises(UserError, match=said):
        check_model(model, 5, 4)


class Words:
    """A tokenizer of three words; what is changed breaks it."""

    vocab_size, start = 3, "a"

    def __init__(self, **changed):
        vars(self).update(changed)

    def encode(self, text):
        return np.array(["abc".index(word) for word in text.split()])

    def decode(self, ids):
        return " ".join("abc"[i] for i in ids)

    def token_bytes(self):
        return np.ones(3, dtype=int)

    def state(self):
        return {}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"encode": lambda text: [0]}, "encode"),
        ({"encode": lambda text: np.array([], dtype=int)}, "at least one"),
        ({"decode": lambda ids: ids}, "decode"),
        ({"token_bytes": lambda: [1, 1, 1]}, "token_bytes"),
        ({"token_bytes": lambda: np.ones(2, dtype=int)}, "3 integers"),
        ({"state": lambda: {"letters": np.arange(3)}}, "plain JSON values"),
        ({"vocab_size": 2, "token_bytes": lambda: np.ones(2, dtype=int)}, "3 when restored"),
    ],
)
def test_a_tokenizer_that_breaks_the_contract_is_refused(changed, said):
    check_tokenizer(Words(), lambda state: Words())
    with pytest.raises(UserError, match=said):
        check_tokenizer(Words(**changed), lambda state: Words())


def test_samples_are_decoded_together():
    """Token by token, words would lose their spaces, and bytes of one character become marks of damage."""

    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "日本é!".encode()
    assert pieces(Bytes(), list(text[:3]), text[3:]) == ["本", "é", "!"]
    assert pieces(Bytes(), [65], text[:2]) == ["\ufffd"]
    assert "a" + "".join(pieces(Words(), [0], [1, 2])) == "a b c"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"record": None}, "lacks record"),
        ({"record": {"name": "x"}}, "must have name and sha256"),
        ({"record": {"name": "x", "sha256": np.int64(1)}}, "plain JSON values"),
        ({"train_ids": [1, 2, 3]}, "train_ids must be a 1-D numpy array of integers, not list"),
        ({"val_ids": None}, "val_ids must be a 1-D numpy array"),
    ],
)
def test_data_that_break_the_contract_are_refused(changed, said):
    """A None takes the attribute away: one that `setup` forgot."""

    def data(**changed):
        made = WindowData(seed=1, name="x", block_size=2, batch_size=1)
        made.tokenizer, made.record = CharTokenizer("abc"), {"name": "x", "sha256": "0"}
        made.train_ids = made.val_ids = np.arange(9) % 3
        for name, value in changed.items():
            delattr(made, name) if value is None else setattr(made, name, value)
        return made

    check_data(data())
    with pytest.raises(ValueError, match=said):
        check_data(data(**changed))
