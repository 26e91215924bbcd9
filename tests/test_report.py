"""What the command line shows and writes when the stages are done."""

from pathlib import Path

from accel import report
from accel.artifacts import Artifact, Manifest
from accel.schema import Config
from accel.stages import generate


def test_output_file_is_written_from_reused_texts(tmp_path: Path) -> None:
    """A second run with the same options reuses the texts; the file the user asked for must be there all the same."""
    made, output = tmp_path / "made", tmp_path / "phonemes.txt"
    made.mkdir()
    (made / generate.RESULTS).write_text('{"inputs": ["b", "a"], "outputs": ["B IY1", "EY1"]}')
    config = Config(generate={"file": "words.txt", "output": str(output)})
    artifact = Artifact(made, Manifest("generate", "key", {}, {}, {}, 0.0, 0, 0, {}, {}))
    for _ in range(2):
        report.finish(config, {"generate": artifact})
        assert output.read_text() == "B IY1\nEY1\n"
        output.unlink()
