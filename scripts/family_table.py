"""The README's table of families: each one's tiny random model taken the whole road, in FP32 and in FP16.

    python -m scripts.family_table [--artifacts FOLDER] [FAMILY ...]

Prints Markdown. About half a minute a family on one core; what is in the folder already is reused.
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
HEADER = ("family", "shape", "YAML lines", "FP32 tokens equal", "FP16 tokens equal", "step's bytes shared")


def row(family: str, folder: Path) -> list[str]:
    """What one family's road came to. Tokens equal: the least of greedy, beams, sampling and padded batches."""
    with testing.prepare(FAMILIES[family], folder / family, artifacts=folder / "artifacts") as subject:
        merged = subject.artifacts["merge"].summary
        equal = [min(made["verify"].summary["identical"].values()) for made in (subject.artifacts, subject.half)]
        shape = "encoder-decoder" if Component.ENCODER in subject.architecture.components() else "decoder-only"
    lines = len((CONF / f"{FAMILIES[family]['model_type']}.yaml").read_text().splitlines())
    shared = merged["shared_bytes"] / merged["decode_bytes"]
    return [family, shape, str(lines), *(f"{share:.0%}" for share in equal), f"{shared:.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts/families"))
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], default=[])
    given = parser.parse_args()
    quiet()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for family in given.families or FAMILIES:
        (given.artifacts / family).mkdir(parents=True, exist_ok=True)
        print(f"| {' | '.join(row(family, given.artifacts))} |", flush=True)


if __name__ == "__main__":
    main()
