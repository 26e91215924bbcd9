"""Print the README's table of families: a tiny random model of each, run end to end in FP32 and in FP16.

    python -m scripts.family_table [--artifacts FOLDER] [FAMILY ...]

Prints Markdown. Takes about half a minute per family on one core; artifacts already in the folder are reused.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from accel import testing
from accel.adapters.types import Component
from accel.system.quiet import quiet
from tests.families import FAMILIES

CONF = Path(__file__).parents[1] / "conf" / "architecture"
HEADER = ("family", "shape", "YAML lines", "FP32 tokens equal", "FP16 tokens equal", "decode weights shared")


def row(family: str, folder: Path) -> list[str]:
    """Run one family's model up to `verify`, and return its row of the table.

    Tokens equal: the share of sequences identical to PyTorch's, the smallest of greedy, beam search, sampling and
    padded batches.

    Args:
        family: A key of `FAMILIES`.
        folder: Folder for checkpoints and artifacts.
    """
    with testing.prepare(FAMILIES[family], folder / family, artifacts=folder / "artifacts") as subject:
        merged = subject.artifacts["merge"].summary
        fp32_equal = min(subject.artifacts["verify"].summary["identical"].values())
        fp16_equal = min(subject.fp16_artifacts["verify"].summary["identical"].values())
        shape = "encoder-decoder" if Component.ENCODER in subject.architecture.components() else "decoder-only"
    yaml_lines = len((CONF / f"{FAMILIES[family]['model_type']}.yaml").read_text().splitlines())
    shared = merged["shared_bytes"] / merged["decode_bytes"]
    return [family, shape, str(yaml_lines), f"{fp32_equal:.0%}", f"{fp16_equal:.0%}", f"{shared:.1%}"]


def main() -> None:
    """Print the table, of the named families or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/families"))
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], default=[])
    arguments = parser.parse_args()
    quiet()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for family in arguments.families or FAMILIES:
        (arguments.artifacts / family).mkdir(parents=True, exist_ok=True)
        print(f"| {' | '.join(row(family, arguments.artifacts))} |", flush=True)


if __name__ == "__main__":
    main()
