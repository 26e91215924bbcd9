"""What is constant in an operation's parts, as C++ that the kernel is compiled with."""

from collections.abc import Sequence

from accel.engine.kernel import records
from accel.engine.operations import attention, product

GATED_UNITS = records.UNITS // 2  # rows of each of two weights in a group


def product_parts(parts: Sequence[product.Part], sizes: Sequence[int], outs: Sequence[int]) -> list[str]:
    """Return what is constant in the parts of a product, of these numbers of features and formats of the outputs."""
    groups = [-(-n // (GATED_UNITS if part.gated else records.UNITS)) for n, part in zip(sizes, parts, strict=True)]
    return [
        records.enum(
            PARTS=len(parts),
            GROUPS=sum(groups),
            BIASES=any(part.has_bias or part.gate_bias for part in parts),
            GATES=any(part.gated for part in parts),
            SAME_OUT=len(set(outs)) == 1,
        ),
        records.function("int", "n", sizes),
        records.function("int", "groups", groups),
        records.function("int", "out", outs),
        records.function("bool", "gated", [part.gated for part in parts]),
        records.function("int", "act", [records.ACTIVATIONS.index(part.activation.name) for part in parts]),
        records.function("float", "alpha", [float(part.alpha) for part in parts]),
        records.function("float", "beta", [float(part.beta) for part in parts]),
        records.function("float", "limit", [float(part.activation.limit) for part in parts]),
    ]


def cut_of(heads: attention.Heads | None, form: int, width: int, repeat: int, rotated: bool) -> str:
    """Return how heads are cut, as members of a struct."""
    if heads is None:
        return ""
    norm = heads.norm
    constants = records.enum(
        START=heads.start,
        PER_GROUP=heads.per_group,
        GROUP_STRIDE=heads.group_stride,
        STRIDE=heads.stride,
        REPEAT=repeat,
        FORMAT=form,
        WIDTH=width,
        NORMED=norm is not None,
        ROTATED=rotated,
    )
    epsilon = records.number("epsilon", norm.epsilon if norm is not None else 0.0)
    return f"{constants} {records.number('scale', heads.scale)} {epsilon}"
