"""Output file and options of the stage `generate`."""

import json
from pathlib import Path

import pytest

import accel
from accel.cli.compose import compose, execute
from accel.errors import AccelError, StageError
from accel.stages import generate


def test_output_is_written_by_the_stage(artifacts: Path, tmp_path: Path) -> None:
    """The file is also written through `accel.build`, and when the artifact is reused."""
    inputs, output = tmp_path / "words.txt", tmp_path / "phonemes.txt"
    inputs.write_text("bee\nspeculative\n")
    overrides = ["runtime=cpu", f"artifacts={artifacts}", "verify.latency=false", "stage=[verify,generate]"]
    written = []
    for _ in range(2):
        accel.build(overrides=[*overrides, f"generate.file={inputs}", f"generate.output={output}"])
        written.append(output.read_text())
        output.unlink()
    assert written[0] == written[1]
    first, second = written[0].splitlines()
    assert first == "B IY1"
    assert second.startswith("S P EH1 K")
    assert list(artifacts.glob(f"t5-g2p/generate-*/{generate.RESULTS}"))


def texts_of(artifacts: Path, *overrides: str) -> list[str]:
    """Return the outputs of the stage on the embedded model."""
    base = ["runtime=cpu", f"artifacts={artifacts}", "verify.latency=false", "stage=[verify,generate]"]
    config = compose([*base, *overrides])
    return json.loads((execute(config)["generate"].folder / generate.RESULTS).read_text())["outputs"]


def test_stop_strings_that_a_tokenizer_can_not_have(artifacts: Path) -> None:
    """The embedded model's tokenizer, of which transformers can't spell the tokens, is named before the first stage."""
    with pytest.raises(AccelError, match=r"generate\.stop_strings=\['IY1'\]: .*the tokenizer of t5-g2p"):
        texts_of(artifacts, "generate.text=bee", "generate.stop_strings=[IY1]")


def test_scores_do_not_change_the_text(artifacts: Path) -> None:
    """Options that make `generate` return more than ids are accepted."""
    scores = ["generate.return_dict_in_generate=true", "generate.output_scores=true"]
    assert texts_of(artifacts, "generate.text=bee", *scores) == ["B IY1"]


def test_what_a_library_raises(artifacts: Path) -> None:
    """An option that transformers refuses late is reported with the stage, and its own error kept as the cause."""
    with pytest.raises(StageError, match=r"stage generate failed: .*attentions") as caught:
        texts_of(
            artifacts, "generate.text=bee", "generate.return_dict_in_generate=true", "generate.output_attentions=true"
        )
    assert isinstance(caught.value.__cause__, ValueError)
