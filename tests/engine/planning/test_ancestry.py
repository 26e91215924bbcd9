"""Plans whose attention reads entries from the rows that computed them, and graphs that have none."""

from pathlib import Path

import pytest
import torch

from accel.engine.executor import Executor
from accel.engine.nodes import Graph
from accel.engine.operations.attention import Attention
from accel.engine.planning.ancestry import ANCESTRY, by_ancestry
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.trace import NoMatchError
from tests.engine.kernel.layers import Sizes, layered, tensors_of
from tests.engine.planning.attention import run
from tests.engine.planning.graphs import LENGTHS, operations

CPU, ROWS = torch.device("cpu"), 3
SECOND = """r0 = MatMul(y0, wq) r1 = Reshape(r0, four) r = Transpose<perm = [0, 2, 1, 3]>(r1)
    products2 = MatMul(r, turned_keys) masked2 = Add(products2, bias) probabilities2 = Softmax<axis = -1>(masked2)
    attended2 = MatMul(probabilities2, values) heads2 = Transpose<perm = [0, 2, 1, 3]>(attended2)
    row2 = Reshape(heads2, row) y = MatMul(row2, wo)"""
MISSES = {
    "written in torch": (
        (
            (
                "present_value = TensorScatter<axis = 2>(past_value, v, position)",
                "present_value = Mul(past_value, two)",
            ),
            ("Unsqueeze(present_value, second_axis)", "Unsqueeze(past_value, second_axis)"),
        ),
        r"past_key is written by .*, not by a fused attention",
    ),
    "read by another layer": (
        (("y = MatMul(row_of_heads, wo)", f"y0 = MatMul(row_of_heads, wo) {SECOND}"),),
        r"present_key is read by other nodes than",
    ),
}


def attentions(plan: Plan) -> list[Attention]:
    """Return the specifications of a plan's attention."""
    found = [node.attributes["spec"] for node in plan.graph.nodes if node.kind[0] == DOMAIN]
    return [spec for spec in found if isinstance(spec, Attention)]


def test_all_written_caches_are_read_by_the_table(tmp_path: Path) -> None:
    """The graph's plan stays as it is; the other one has an input more."""
    plan = run(tmp_path)
    found = by_ancestry(plan)
    assert [spec.ancestry for spec in attentions(plan)] == [False]
    assert [spec.ancestry for spec in attentions(found)] == [True]
    assert set(found.graph.inputs) - set(plan.graph.inputs) == {ANCESTRY}
    lengths = {"B": LENGTHS["B"], "S": LENGTHS["S"]}
    words = [row.description for row in found.table(lengths) if row.operation == "attention"]
    assert words == ["4 heads of 8 over 2, rotary of 8, 1 bias, new key and value written, entries by beam ancestry"]


@pytest.mark.parametrize("name", MISSES)
def test_misses(name: str, tmp_path: Path) -> None:
    """Entries that are read in another way too, of which the table knows nothing."""
    changes, reason = MISSES[name]
    plan = run(tmp_path, *changes)
    assert [name for name in operations(plan) if "attention" in name]
    with pytest.raises(NoMatchError, match=reason):
        by_ancestry(plan)


def test_no_caches() -> None:
    plan = layered(Sizes())
    graph = Graph([], {"x": torch.float16}, [], {})
    with pytest.raises(NoMatchError, match="no attention writes a cache"):
        by_ancestry(Plan(graph, plan.trace, {}))


def test_cross_attention_is_left_alone() -> None:
    """A step by a table of own rows is the same; one by another table isn't; fixed caches are read as before."""
    sizes = Sizes()
    plan = layered(sizes)
    found = by_ancestry(plan)
    assert [spec.ancestry for spec in attentions(found)] == [True, False] * sizes.layers
    table = torch.arange(ROWS, dtype=torch.int32)[:, None].repeat(1, sizes.length)
    logits = []
    for each, rows in ((plan, table), (found, table), (found, table.roll(1, 0))):
        tensors = tensors_of(plan, sizes, ROWS, CPU, filled=True)
        tensors["position"].fill_(9)
        own = rows.clone()
        own[:, 9:] = table[:, 9:]
        executor = Executor(each.graph, CPU)
        result = executor.run({**{name: tensors[name] for name in plan.graph.inputs}, ANCESTRY: own})
        logits.append(result["logits"])
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2], atol=0.01)
