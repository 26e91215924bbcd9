"""Runtime presets read without Hydra equal those that Hydra composes; options are checked."""

from dataclasses import replace

import pytest

from accel.cli.compose import compose
from accel.config.presets import OPTIONS, dump, runtime_preset
from accel.errors import AccelError


def test_presets_equal_composed_runtimes() -> None:
    """Presets equal Hydra's result, also where a file extends another by its `defaults` list."""
    composed = compose(["architecture=t5", "runtime=cpu"]).runtime
    assert runtime_preset("cpu") == composed
    graph, cuda = runtime_preset("cuda-graph"), runtime_preset("cuda")
    assert (graph.provider, graph.provider_options) == (cuda.provider, cuda.provider_options)
    assert (graph.static, graph.capture, cuda.static, cuda.capture) == (True, True, False, False)
    assert graph.buckets != cuda.buckets


def test_values_of_the_build() -> None:
    """Values that a deployable was built with replace those of the preset of the same name; options replace both."""
    built = dump(replace(runtime_preset("cpu"), buckets=[7, 9], threads=3))
    assert runtime_preset("cpu", built).buckets == [7, 9]
    assert runtime_preset("cpu", built, threads=1).threads == 1
    assert runtime_preset("cuda", built).buckets == runtime_preset("cuda").buckets


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("cpu", {"bucket": [8]}, ("bucket", "Did you mean buckets?", *OPTIONS[:3])),
        ("cpu", {"threads": "many"}, ("runtime=cpu", "many")),
        ("cpu", {"buckets": 8}, ("runtime=cpu",)),
        ("gpu", {}, ("unknown runtime: 'gpu'", "cpu, cuda, cuda-fused, cuda-graph")),
    ],
)
def test_invalid_options(name: str, options: dict[str, object], named: tuple[str, ...]) -> None:
    with pytest.raises(AccelError) as caught:
        runtime_preset(name, None, **options)
    for part in named:
        assert part in str(caught.value)
