"""Text inputs: tokenizer, padding, references."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config

from accel.data import texts
from accel.errors import AccelError

VOCABULARY = ["<pad>", "<unk>", "the", "same", "words", "come", "out"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer that splits at spaces and takes at most four tokens."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=4, padding_side="right"
    )


def test_encode_pads_and_masks(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """Texts of different length become padded ids and a mask, without a warning."""
    encoded = texts.encode(tokenizer, ["the same words", "come"])
    assert encoded["input_ids"].tolist() == [[2, 3, 4], [5, 0, 0]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert caplog.text == ""


def test_text_that_is_too_long(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """It is cut, and the warning has the text, its length, the model's limit and the number of tokens lost."""
    encoded = texts.encode(tokenizer, ["the same words come out the same", "come"])
    assert encoded["input_ids"].tolist() == [[2, 3, 4, 5], [5, 0, 0, 0]]
    warning = caplog.text
    for part in ("the same words come out the same", "7", "4", "last 3", "cut"):
        assert part in warning


def test_saved_tokenizer_is_found(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A folder's tokenizer is loaded; a folder without one gives None."""
    assert texts.load_tokenizer(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    T5Config().save_pretrained(tmp_path)
    loaded = texts.load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded("same words")["input_ids"] == [3, 4]


def test_pad() -> None:
    """Single inputs become one batch: ids are padded with the padding id, masks with 0."""
    first = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    second = {"input_ids": torch.tensor([[8]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
    batch = texts.pad([first, second], 9, left=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_references_are_read(tmp_path: Path) -> None:
    """Lines of text, tab and accepted outputs are read up to a limit; a line without a tab is named by its number."""
    path = tmp_path / "heldout.tsv"
    path.write_text("one\tW AH1 N\ntwo\tT UW1\tT OO\nthree\tX\n")
    references = texts.References.read(path).first(2)
    assert (list(references.texts), [list(row) for row in references.accepted]) == (
        ["one", "two"],
        [["W AH1 N"], ["T UW1", "T OO"]],
    )
    path.write_text("one\tW\nbroken\n")
    with pytest.raises(AccelError, match="line 2"):
        texts.References.read(path)
