"""Output file of the stage `generate`."""

from pathlib import Path

import accel
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
