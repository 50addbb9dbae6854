"""Problems as people write them, without what sampling must not import."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_problems import addition, sorting

from gptlab.data.notation import Addition, Sorting, notation_of
from gptlab.errors import UserError


def test_sampling_needs_no_lightning_for_it():
    """Which takes 2.5 s to import."""
    code = "import sys, gptlab.data.notation; print({'torch', 'numpy', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@settings(deadline=None)
@given(st.integers(1, 30), st.data(), st.sampled_from(["{}+{}=", "{}+{}", " {} + {} = \n", "00{}+0{}="]))
def test_sums_as_people_write_them(ndigit, drawn, form):
    """Against Python's numbers: what is asked is what was written, and the answer reads as the sum."""
    a, b = (drawn.draw(st.integers(0, 10**ndigit - 1)) for _ in "ab")
    notation, data = Addition(ndigit), addition(ndigit)
    tokens = notation.parse(form.format(a, b))
    assert tokens == f"{a:0{ndigit}}{b:0{ndigit}}" and notation.n_answer == data.n_answer
    problem = data.with_answers(data.tokenizer.encode(tokens).astype(int)[None])[0].tolist()
    assert notation.format_answer(data.tokenizer.decode(problem)[2 * ndigit :]) == str(a + b)


@pytest.mark.parametrize(
    "text", ["8550", "85-50=", "+50=", "85+", "1+2+3=", "85+50==", "", "\u0663+1=", "-1+2=", "a+b="]
)
def test_other_prompts_are_no_sums(text):
    assert Addition(2).parse(text) is None


@pytest.mark.parametrize(
    ("notation", "text", "reason"),
    [
        (Addition(2), "850+50=", "must have at most data.ndigit=2 digits"),
        (Addition(2), f"1+{'9' * 5000}=", "must have at most data.ndigit=2 digits"),
        (Sorting(6), "2 0 1", "'2 0 1' must have data.length=6 symbols"),
        (Sorting(2), "2 0 1", "must have data.length=2 symbols"),
    ],
)
def test_questions_that_the_model_cannot_be_asked(notation, text, reason):
    with pytest.raises(UserError, match=reason) as error:
        notation.parse(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "tokens"), [("2 0 1", "201"), ("201", "201"), (" 2 0\n1 ", "201"), ("20", None), ("", None)]
)
def test_symbols_as_people_write_them(text, tokens):
    assert Sorting(3).parse(text) == tokens
    assert Sorting(3).format_answer("012") == "0 1 2"


@pytest.mark.parametrize(
    "data", [addition(1), addition(2), addition(40), sorting(2, 2), sorting(6, 3), sorting(40, 62)]
)
def test_the_example_can_be_asked(data):
    """It stands in the advice at the end of a run."""
    tokens = data.notation.parse(data.notation.example)
    assert len(data.tokenizer.encode(tokens)) == data.n_question and data.notation.n_answer == data.n_answer


def test_the_notation_of_a_checkpoint():
    """Its config may come from anyone: numbers that would fill the memory are none."""
    target = "gptlab.data.problems."
    assert notation_of({"_target_": f"{target}AdditionData", "ndigit": 2}) == Addition(2)
    assert notation_of({"_target_": f"{target}SortData", "length": 6, "n_symbols": 3}) == Sorting(6)
    for size in (None, "2", 0, -1, 10**18, [2]):
        assert notation_of({"_target_": f"{target}AdditionData", "ndigit": size}) is None
    for other in (
        {},
        {"_target_": "gptlab.data.text.TextData"},
        {"_target_": ["x"], "ndigit": 2},
        {"_target_": f"{target}SortData"},
    ):
        assert notation_of(other) is None
