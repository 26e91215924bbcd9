"""What the stage writes beside its artifact."""

from pathlib import Path

import accel
from accel.stages import generate


def test_output_is_written_by_the_stage(artifacts: Path, tmp_path: Path) -> None:
    """Through `accel.build` as well, and also when the texts are reused: the file must be there all the same."""
    words, output = tmp_path / "words.txt", tmp_path / "phonemes.txt"
    words.write_text("bee\nspeculative\n")
    given = ["runtime=cpu", f"artifacts={artifacts}", "verify.latency=false", "stage=[verify,generate]"]
    written = []
    for _ in range(2):
        accel.build(overrides=[*given, f"generate.file={words}", f"generate.output={output}"])
        written.append(output.read_text())
        output.unlink()
    assert written[0] == written[1]
    first, second = written[0].splitlines()
    assert first == "B IY1"
    assert second.startswith("S P EH1 K")
    assert list(artifacts.glob(f"t5-g2p/generate-*/{generate.RESULTS}"))
