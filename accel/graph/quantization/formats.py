"""Weight formats by the names that the configuration gives them."""

from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.channels import ChannelFormat

BITS = (8, 4)
BLOCK_SIZES = (16, 32, 64, 128, 256)  # of `MatMulNBits`
CHANNEL = "channel"
WeightFormat = BlockFormat | ChannelFormat


def formats(bits: int) -> dict[str, WeightFormat]:
    """Return the formats of that many bits by the names that `precision.weight_formats` takes."""
    by_name: dict[str, WeightFormat] = {}
    for block in BLOCK_SIZES:
        by_name[f"block-{block}"] = BlockFormat(bits, block)
        by_name[f"block-{block}-zero-point"] = BlockFormat(bits, block, symmetric=False)
    if bits == 8:
        by_name[CHANNEL] = ChannelFormat()
    return by_name


def format_named(name: str) -> WeightFormat:
    """Return the format of the name that plans hold, such as `int4 block-32`.

    Raises:
        ValueError: No such format exists.
    """
    for bits in BITS:
        for format in formats(bits).values():
            if format.name == name:
                return format
    raise ValueError(f"no weight format is named {name!r}")
