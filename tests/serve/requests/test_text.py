"""Text of tokens that arrive one by one: detokenization and stop strings."""

from hypothesis import given
from hypothesis import strategies as st

from accel.serve.requests.detokenizer import Detokenizer
from accel.serve.requests.stop_strings import StopStrings
from tests.serve.servers import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.integers(1, 5))
def test_pieces_are_whole_characters_and_add_up(text: str, size: int) -> None:
    """Bytes of one character arrive one by one; no piece has half of one, and all pieces together are the text."""
    ids = TOKENIZER(text)["input_ids"]
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(ids[start : start + size]) for start in range(0, len(ids), size)]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == text


def test_a_long_run_ends_within_a_character() -> None:
    """What is complete is returned, the rest once it is."""
    ids = TOKENIZER("abc " * 20 + "€")["input_ids"]
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add(ids[:-1]) == "abc " * 20
    assert detokenizer.add(ids[-1:]) == "€"
    assert detokenizer.finish() == ""


def test_incomplete_character_at_the_end() -> None:
    """Half of a character is held back, and shown as a replacement character once nothing can follow."""
    ids = TOKENIZER("a€")["input_ids"]
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add(ids[:-1]) == "a"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_bytes_that_are_no_characters_are_not_held_for_ever() -> None:
    """A long run of invalid bytes appears before its end."""
    (byte,) = TOKENIZER.convert_tokens_to_ids(["ÿ"])
    detokenizer = Detokenizer(TOKENIZER)
    assert len(detokenizer.add([byte] * 40)) >= 24
    assert detokenizer.finish()


def test_special_tokens_have_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add([*TOKENIZER("ab")["input_ids"], 2, 0]) + detokenizer.finish() == "ab"


def test_context_is_not_returned() -> None:
    """Ids of the prompt complete a character that it began, and aren't repeated."""
    ids = TOKENIZER("x€y")["input_ids"]
    detokenizer = Detokenizer(TOKENIZER, ids[:1])
    assert detokenizer.add(ids[1:]) + detokenizer.finish() == "€y"


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 4),
)
def test_stop_strings_across_pieces(text: str, stops: list[str], size: int) -> None:
    """The text ends before the stop string that is complete first, however the text is cut."""
    finder = StopStrings(stops)
    got = ""
    for start in range(0, len(text), size):
        got += finder.add(text[start : start + size])
    got += finder.finish()
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert finder.found == bool(ends)
    assert got == (text[: min(ends)[1]] if ends else text)
