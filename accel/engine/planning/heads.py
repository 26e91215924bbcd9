"""Match how the heads of queries, keys and values are cut from a row of features, normed and rotated."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.engine.operations.attention import ANGLES, Heads, Rotary, turned
from accel.engine.operations.normalize import Norm
from accel.engine.planning.linear_maps import (
    LINEAR,
    FeatureMap,
    Region,
    Rotation,
    evaluate,
    feature_map,
    find_region,
    is_close,
    random_like,
    rotation,
)
from accel.engine.planning.patterns import RMS_NORM, Matcher
from accel.engine.planning.trace import BATCH, NoMatchError, Trace


@dataclass(frozen=True)
class Cut:
    """Heads that are cut from a row.

    Attributes:
        row: The value with the row.
        heads: Where the heads lie.
        rotation: How they are rotated, and by which values with cosines and sines; None if they aren't.
        weight: Weight of their norm, or None.
    """

    row: str
    heads: Heads
    rotation: tuple[Rotary, str, str] | None = None
    weight: str | None = None


def match_heads(matcher: Matcher, name: str, size: int, with_norm: bool) -> Cut:
    """Match how the heads of a value are computed from a row.

    What no operation computes between the row and the heads stays as it is: then the row is a later value.

    Args:
        matcher: The state.
        name: The heads: the elements that belong to a row of the batch are whole heads, one after another.
        size: Features of a head.
        with_norm: The norm of the heads may belong to it.

    Raises:
        NoMatchError: The heads are in no regular order.
    """
    try:
        cut = _rotated(matcher, find_region(matcher.trace, name, matcher.hidden, LINEAR), size)
    except NoMatchError as reason:
        matcher.check_row(name, None)
        matcher.note(name, reason)
        cut = _plain(matcher, Region(name, name, []), size)
    return _normed(matcher, cut) if with_norm else cut


def _rotated(matcher: Matcher, region: Region, size: int) -> Cut:
    """Match heads that are views of a row, and scaled or rotated."""
    if not region.sides:
        return _plain(matcher, region, size)
    features, found = rotation(region, matcher.trace)
    index = features.features.reshape(-1, size)
    cut = Cut(region.root, _regular(index, features.scale), (_rotary(found, index), found.cos, found.sin))
    matcher.check_row(region.root, None)
    _compare(matcher.trace, region, cut)
    return cut


def _plain(matcher: Matcher, region: Region, size: int) -> Cut:
    """Match heads that are views of a row."""
    matcher.check_row(region.root, None)
    features = feature_map(region, matcher.trace) if region.nodes else _all(matcher.trace, region.root)
    if len(features.features) % size:
        raise NoMatchError(f"{region.target} has {len(features.features)} features, no multiple of {size}")
    return Cut(region.root, _regular(features.features.reshape(-1, size), features.scale))


def _all(trace: Trace, name: str) -> FeatureMap:
    """Return the map of a row to itself."""
    return FeatureMap(torch.arange(trace.values[name].numel() // BATCH), 1.0)


def _normed(matcher: Matcher, cut: Cut) -> Cut:
    """Return heads with the norm that comes before all else, where the row holds the results of one for every head."""
    trace, size = matcher.trace, cut.heads.size
    node = trace.producer.get(cut.row)
    if node is None or node.kind != RMS_NORM:
        return cut
    try:
        norm, tensors = matcher.norm(node, size)
        region = find_region(trace, node.inputs[0], matcher.hidden)
        matcher.check_row(region.root, None)
        before = feature_map(region, trace) if region.nodes else _all(trace, region.root)
        index = torch.from_numpy(cut.heads.features())  # [heads, size], within the norm's result
        if before.scale != 1 or (index[:, 0] % size).any():
            raise NoMatchError(f"{node.name} is scaled before, or is not of the heads that are cut after it")
        features = before.features[index]
        heads = replace(_regular(features, cut.heads.scale), norm=norm)
    except NoMatchError as reason:
        matcher.note(node.name, reason)
        return cut
    return replace(cut, row=region.root, heads=heads, weight=tensors[0])


def _regular(index: Tensor, scale: float, norm: Norm | None = None) -> Heads:
    """Return the regular cut of features with these indices, int64 [heads, size].

    Raises:
        NoMatchError: They don't lie in groups of equal distances.
    """
    count, size = index.shape
    starts = index[:, 0]
    for per_group in (each for each in range(count, 0, -1) if count % each == 0):
        grouped = starts.reshape(-1, per_group)
        stride = int(grouped[0, 1] - grouped[0, 0]) if per_group > 1 else size
        distance = int(grouped[1, 0] - grouped[0, 0]) if len(grouped) > 1 else stride * per_group
        heads = Heads(int(starts[0]), len(grouped), per_group, distance, stride, size, scale, norm)
        if torch.equal(torch.from_numpy(heads.features()), index):
            return heads
    raise NoMatchError(f"heads begin at features {starts.tolist()}, or their features are not side by side")


def _rotary(found: Rotation, features: Tensor) -> Rotary:
    """Return the rotation of heads with these features, int64 [heads, size].

    Raises:
        NoMatchError: Heads are rotated differently, or not in a known way.
    """
    size = features.shape[1]
    cosines, sines, signs, partners = (
        each.reshape(-1, size) for each in (found.cosines, found.sines, found.signs, found.partners)
    )
    rotated = int((cosines[0] >= 0).sum())
    place = torch.arange(rotated)
    for interleaved in (False, True) if rotated % 2 == 0 else ():
        partner = place ^ 1 if interleaved else (place + rotated // 2) % rotated
        sign = torch.where(place % 2 == 0 if interleaved else place < rotated // 2, -1.0, 1.0).double()
        for angles, at in ANGLES.items():
            expected = torch.tensor([at(i, rotated) for i in range(rotated)])
            pairs = ((cosines, expected), (sines, expected), (partners, features[:, partner]), (signs, sign))
            if all(torch.equal(each[:, :rotated], want.expand(len(each), rotated)) for each, want in pairs):
                return Rotary(rotated, interleaved, angles)
    raise NoMatchError(f"features are rotated with partners {partners[0].tolist()}")


def _compare(trace: Trace, region: Region, cut: Cut) -> None:
    """Raise `NoMatchError` if rotated heads differ from what the region computes of random numbers."""
    if cut.rotation is None:
        return
    rotary, cos, sin = cut.rotation
    sides = {name: random_like(trace, name) for name in (cos, sin)}
    count = rotary.size if rotary.angles == "full" else rotary.size // 2
    if any(side.numel() not in (count, BATCH * count) for side in sides.values()):
        raise NoMatchError(f"{cos} and {sin} have no {count} numbers for a row")
    root = random_like(trace, region.root)
    heads = root.reshape(BATCH, -1).numpy()[:, cut.heads.features()] * cut.heads.scale
    expected = torch.from_numpy(turned(heads, sides[cos].numpy(), sides[sin].numpy(), rotary))
    if not is_close(evaluate(region, trace, root, sides).reshape(expected.shape), expected):
        raise NoMatchError(f"{region.target} is no rotation of {region.root} alone")
