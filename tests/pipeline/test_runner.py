"""Pipeline: which stages run, what their keys depend on, and resuming after a kill."""

import importlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from accel.adapters import registry
from accel.cli.compose import compose
from accel.config.schema import STAGES, Config
from accel.errors import AccelError
from accel.pipeline import runner as module
from accel.pipeline import source
from accel.pipeline.runner import EXPLICIT, HIDDEN, Pipeline, load_stage, restrict_config, select_stages
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.system import host_memory
from tests.conftest import Build, overrides_for

BEFORE_GENERATE = (*HIDDEN, *STAGES[: STAGES.index("generate")])
CAUSAL = "accel.architectures.causal"
AFTER_MERGE = ("merge", "verify", "generate", "benchmark", "profile", "plan")


@cache
def composed(tiny: Path, *overrides: str) -> Config:
    """Return the composed configuration; cached, because composing takes a quarter of a second."""
    return compose(overrides_for(tiny, Path("unused"), *overrides))


def pipeline(tiny: Path, root: Path, *overrides: str) -> Pipeline:
    """Return a pipeline over the tiny checkpoint that has run nothing yet."""
    config = replace(composed(tiny, *overrides), artifacts=str(root))
    return Pipeline(config, registry.build(config.architecture))


def keys(tiny: Path, *overrides: str) -> dict[str, str]:
    """Return the key of every stage."""
    config = composed(tiny, *overrides)
    subject = Pipeline(config, registry.build(config.architecture))
    return {name: subject.key(name) for name in (*HIDDEN, *STAGES)}


def changed(tiny: Path, *overrides: str) -> set[str]:
    """Return the stages whose key `overrides` change."""
    before, after = keys(tiny), keys(tiny, *overrides)
    return {name for name in before if before[name] != after[name]}


# choice of stages


def test_nothing_runs_for_an_audit_in_fp32(tiny: Path, tmp_path: Path) -> None:
    """`stage=all` neither audits nor calibrates in FP32; naming the stage does both."""
    subject = pipeline(tiny, tmp_path, "precision=fp32")
    everything = subject.pending(select_stages("all", mixed=False))
    assert {"export", "reference", "verify"} <= everything
    assert not everything & {"answers", "calibrate", "audit"}
    assert subject.pending(["audit"]) >= {"answers", "calibrate", "audit"}


def test_chosen_stages_are_ordered() -> None:
    """`all`, one name or a list in any order gives stages in the order of the pipeline."""
    everything = [name for name in STAGES if name not in EXPLICIT]
    assert select_stages("all") == everything
    assert select_stages("all", mixed=False) == [name for name in everything if name != "audit"]
    assert select_stages(["all", "audit"], mixed=False) == everything
    assert select_stages(["plan", "all"]) == list(STAGES)
    assert select_stages("merge") == ["merge"]
    assert select_stages(["verify", "export", "merge", "export"]) == ["export", "merge", "verify"]
    for hidden in HIDDEN:
        assert hidden not in select_stages("all")


@pytest.mark.parametrize("stage", ["exports", ["export", "exports"], "checkpoint", "", None, 3, ["all", 1]])
def test_unknown_stage_is_named_with_the_choices(stage: object) -> None:
    """The message has the value and all stages."""
    with pytest.raises(AccelError) as caught:
        select_stages(stage)
    message = str(caught.value)
    for name in (*STAGES, "all"):
        assert name in message
    if stage == "exports":
        assert "'exports'" in message
        assert "Did you mean export?" in message


def test_all_inside_a_list_means_all() -> None:
    """`stage=[all]` is `stage=all`, not an unknown stage."""
    assert select_stages(["all"]) == select_stages("all")


# sections of a stage


def test_undeclared_sections_are_reset() -> None:
    """A stage gets its declared sections, and the defaults of all others."""
    config = Config(artifacts="other", generate={"num_beams": 3})
    config.benchmark.source_length = 7
    config.merge.flag = "with_past"
    config.export.seed = 5
    restricted = restrict_config(config, ("merge",))
    assert restricted == Config(merge=config.merge)
    assert restrict_config(config, ()) == Config()
    assert config.export.seed == 5


def test_every_stage_declares_what_it_reads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage runs with the sections that its key is made of, and no others."""
    configs: dict[str, Config] = {}
    use_stubs(monkeypatch, lambda name, config, folder: configs.__setitem__(name, config))
    subject = pipeline(tiny, tmp_path, "benchmark.source_length=9", "export.seed=4", "+generate.num_beams=2")
    subject.run(select_stages(["all", *EXPLICIT]))
    assert set(configs) >= set(STAGES)
    for name, config in configs.items():
        assert config == restrict_config(subject.config, load_stage(name).sections)
    assert configs["merge"].benchmark == Config().benchmark
    assert configs["merge"].generate == {}


# keys


@pytest.mark.parametrize(
    "override",
    [
        "benchmark.source_length=99",
        "benchmark.new_tokens=99",
        "benchmark.num_beams=3",
        "benchmark.batch_size=3",
        "profile.new_tokens=99",
        "profile.source_length=99",
        "+generate.max_new_tokens=99",
        "+generate.num_beams=3",
        "+generate.text=word",
        "artifacts=other",
        "stage=merge",
    ],
)
def test_generation_options_change_no_key_before_generate(tiny: Path, override: str) -> None:
    """A sweep over lengths and beams exports, merges and verifies once."""
    assert changed(tiny, override) & set(BEFORE_GENERATE) == set()


@pytest.mark.parametrize(
    ("override", "rerun", "kept"),
    [
        ("benchmark.new_tokens=99", {"benchmark"}, {"generate", "profile"}),
        ("profile.new_tokens=99", {"profile"}, {"generate", "benchmark"}),
        ("+generate.num_beams=3", {"generate"}, {"benchmark", "profile"}),
        ("merge.flag=with_past", set(AFTER_MERGE), {"checkpoint", "reference", "export", "optimize", "convert"}),
        ("optimize.passes.simplify=false", {"optimize", *AFTER_MERGE}, {"checkpoint", "reference", "export"}),
        ("export.opset=21", {"export", "optimize", *AFTER_MERGE}, {"checkpoint", "reference"}),
        ("verify.seed=9", {"reference", "verify"}, {"checkpoint", "export", "optimize", "convert", "merge"}),
        ("runtime.threads=1", {"calibrate", "verify", "benchmark", "profile"}, {"checkpoint", "optimize", "reference"}),
        ("runtime.engine=onnxruntime", {"verify", "benchmark", "profile"}, {"calibrate", "audit", "convert", "merge"}),
        ("runtime.buckets=[32]", {"verify", "benchmark", "profile"}, {"calibrate", "audit", "convert", "merge"}),
        ("precision=fp16", {"convert", *AFTER_MERGE}, {"checkpoint", "export", "optimize"}),
        ("audit.seed=5", {"calibrate", "audit"}, {"checkpoint", "reference", "export", "optimize", "convert"}),
        ("audit.trials=0", {"audit"}, {"calibrate", "reference", "convert"}),
        ("precision.plan=rules", {"audit", "verify"}, {"calibrate", "reference", "convert"}),  # FP32 has no plan
        ("verify.max_metric_loss=5", {"verify"}, {"reference", "merge"}),
    ],
)
def test_stages_that_a_value_changes(tiny: Path, override: str, rerun: set[str], kept: set[str]) -> None:
    """A changed value changes the keys of the stages that use it and of those downstream, not of those upstream."""
    found = changed(tiny, override)
    assert rerun <= found
    assert not kept & found


def test_keys_depend_on_the_weights(tiny: Path, tmp_path: Path) -> None:
    """One changed bit of the checkpoint changes all keys; the folder's name changes none."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    before, moved = keys(tiny), keys(copy)
    for name in ("checkpoint", "export", "optimize", "convert", "merge"):
        assert moved[name] == before[name]
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = keys(copy)
    assert [name for name in before if before[name] == after[name]] == []


def test_keys_depend_on_the_adapter_and_the_packages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter source, or another version of a package that a stage uses, changes its key."""
    before = keys(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(module, "adapter_source", lambda config, adapter: "other source")
        after = keys(tiny)
    assert {name for name in before if before[name] != after[name]} >= {"export", "merge", "verify"}
    monkeypatch.setattr(module, "versions", lambda names: dict.fromkeys(names, "0") if "onnxscript" in names else {})
    after = keys(tiny)
    assert before["export"] != after["export"]


def test_keys_depend_on_the_code_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change of its module or of any module it imports changes the key; a docstring or comment doesn't."""
    real, changed = source._path, {"accel.graph.files": "x = 1\n"}
    before = {name: source.stage_source(name) for name in STAGES}

    def path(module: str) -> Path | None:
        file = real(module)
        if file is None or module not in changed:
            return file
        copy = tmp_path / f"{module}.py"
        copy.write_text(file.read_text() + changed[module])
        return copy

    monkeypatch.setattr(source, "_path", path)
    source._module.cache_clear()
    after = {name: source.stage_source(name) for name in STAGES}
    assert {name for name in STAGES if before[name] != after[name]} >= {"export", "optimize", "merge", "verify"}
    changed["accel.graph.files"] = "# a comment\n"
    source._module.cache_clear()
    assert {name: source.stage_source(name) for name in STAGES} == before
    source._module.cache_clear()


def test_keys_depend_on_the_wrapper_that_a_yaml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper's code is part of the key, as the adapter's own is."""
    file = tmp_path / "some_wrapper.py"
    file.write_text("class Decoder: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("some_wrapper")
    target = {"_target_": "accel.architectures.causal.Causal", "wrapper": {"_target_": "some_wrapper.Decoder"}}
    adapter = registry.build(target | {"wrapper": {"_target_": "some_wrapper.Decoder", "_partial_": True}})
    before = source.adapter_source(target, adapter)
    assert before == source.adapter_source(target, adapter)
    assert before != source.adapter_source({"_target_": target["_target_"]}, adapter)
    file.write_text("class Decoder: pass\n")
    assert before != source.adapter_source(target, adapter)


def test_keys_depend_on_code_without_a_file() -> None:
    """A notebook's class has no file, so the bytecode of its functions is part of the key."""
    hashes = set()
    for number in (1, 1, 2):
        space: dict[str, Any] = {"__name__": "__main__", "Causal": importlib.import_module(CAUSAL).Causal}
        exec(f"class Mine(Causal):\n    def components(self):\n        return {number}, [i for i in 'ab']\n", space)
        hashes.add(source.adapter_source({}, space["Mine"]()))
    assert len(hashes) == 2


# stub stages: the real ones' names, inputs and sections, but hardly any work


def use_stubs(monkeypatch: pytest.MonkeyPatch, work: Callable[[str, Config, Path], Any]) -> None:
    """Replace every stage by a stub that calls `work(name, config, folder)` and writes two files."""

    def stub(name: str) -> Stage:
        def run(config: Config, inputs: Mapping[str, Artifact], architecture: Any, out: Path) -> Mapping[str, Any]:
            for upstream in inputs.values():
                assert (upstream.folder / "made").exists() or upstream.manifest.stage == "checkpoint"
            (out / "half").write_text(name)
            work(name, config, out)
            (out / "made").write_text(name)
            return {}

        return replace(load_stage(name), run=run)

    stubs = {name: stub(name) for name in (*HIDDEN, *STAGES)}
    monkeypatch.setattr(Pipeline, "stage", lambda self, name: stubs[name])
    monkeypatch.setattr(host_memory, "release", lambda: None)  # collecting garbage takes longer than these stages


def order_of_all(tiny: Path, root: Path) -> list[str]:
    """Run `stage=all` in an empty folder, and return the stages in the order in which they ran."""
    fresh = pipeline(tiny, root)
    fresh.run(select_stages("all"))
    return fresh.built


def killed_at(victim: str, tiny: Path, root: Path) -> int:
    """Run `stage=all` in a process that is killed in the middle of stage `victim`. Returns its exit signal."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                use_stubs(patch, lambda name, *_: os.kill(os.getpid(), signal.SIGKILL) if name == victim else None)
                pipeline(tiny, root).run(select_stages("all"))
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_kill_at_every_stage(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill in any stage, the next run finishes and repeats no finished stage."""
    use_stubs(monkeypatch, lambda *_: None)
    order = order_of_all(tiny, tmp_path / "uninterrupted")
    assert set(STAGES) - set(EXPLICIT) <= set(order)
    for position, victim in enumerate(order):
        root = tmp_path / victim
        assert killed_at(victim, tiny, root) == signal.SIGKILL
        resumed = pipeline(tiny, root)
        resumed.run(select_stages("all"))
        assert resumed.built == order[position:], f"killed in {victim}"
        again = pipeline(tiny, root)
        again.run(select_stages("all"))
        assert again.built == []
        assert not list(root.glob("*/*.tmp*"))


@pytest.mark.parametrize("name", STAGES)
def test_single_stage_runs_or_reuses_its_inputs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A stage runs the stages that it depends on and no others; where their artifacts exist, it runs alone."""
    use_stubs(monkeypatch, lambda *_: None)
    fresh = pipeline(tiny, tmp_path / "a")
    fresh.run([name])
    assert set(fresh.built) == {name} | fresh._upstream(name) - {"checkpoint"}
    assert fresh.built[-1] == name
    before = pipeline(tiny, tmp_path / "b")
    before.run(sorted(fresh._upstream(name) - {"checkpoint"}))
    second = pipeline(tiny, tmp_path / "b")
    second.run([name])
    assert second.built == [name]


def test_deleted_intermediates_are_not_made_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the deployable exists, deleted intermediates are not made again, not even by later stages."""
    use_stubs(monkeypatch, lambda *_: None)
    order_of_all(tiny, tmp_path)
    for name in ("export", "optimize", "audit", "convert", "merge", "reference", "generate"):
        for folder in tmp_path.glob(f"*/{name}-*"):
            shutil.rmtree(folder, ignore_errors=True)
    second = pipeline(tiny, tmp_path)
    second.run(select_stages("all", mixed=False))
    assert second.built == ["generate"]


def test_damaged_intermediate_is_made_again_when_needed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged input is made again when a stage that reads it must run; later artifacts stay."""
    use_stubs(monkeypatch, lambda *_: None)
    order_of_all(tiny, tmp_path)
    (merge,) = tmp_path.glob("*/merge-*[!k]")
    (convert,) = tmp_path.glob("*/convert-*[!k]")
    shutil.rmtree(merge)
    (convert / "made").write_text("broken")
    second = pipeline(tiny, tmp_path)
    second.run(["merge"])
    assert second.built == ["convert", "merge"]


def test_damaged_result_is_made_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged deployable of a finished run is made again, though no other stage needs it."""
    use_stubs(monkeypatch, lambda *_: None)
    order_of_all(tiny, tmp_path)
    (verify,) = tmp_path.glob("*/verify-*[!k]")
    (verify / "made").write_text("broken")
    second = pipeline(tiny, tmp_path)
    second.run(select_stages("all"))
    assert second.built == ["verify"]
    assert (verify / "made").read_text() != "broken"


# real stages


@pytest.fixture
def copied(build: Build, tiny: Path, artifacts: Path, tmp_path: Path) -> Path:
    """Copy of all artifacts up to the tiny model's deployable."""
    config, _ = build(tiny, "[export,optimize,audit,convert,merge,verify]")
    subject = Pipeline(config, registry.build(config.architecture))
    for name in (*HIDDEN, *STAGES[: STAGES.index("generate")]):
        found = subject.find(name)
        if found is not None and name != "checkpoint":
            shutil.copytree(found.folder, tmp_path / found.folder.relative_to(artifacts))
    return tmp_path


def test_verified_without_its_intermediates(copied: Path, tiny: Path) -> None:
    """The deployable of a real run is reused after its intermediates were deleted."""
    for name in ("export", "optimize", "audit", "convert", "merge", "reference"):
        for folder in copied.glob(f"*/{name}-*"):
            shutil.rmtree(folder)
    subject = pipeline(tiny, copied)
    found = subject.run(["verify"])
    assert subject.built == []
    assert (found["verify"].folder / "onnx/decoder_model_merged.onnx").is_file()


def test_real_stages_resume(copied: Path, tiny: Path) -> None:
    """Without optimize's and later artifacts, a run makes them from the existing export, with identical bytes."""
    before = {path.name: path.read_bytes() for path in copied.glob("*/merge-*/onnx/*.onnx")}
    assert before
    for name in ("optimize", "audit", "convert", "merge", "verify"):
        for folder in copied.glob(f"*/{name}-*"):
            shutil.rmtree(folder)
    subject = pipeline(tiny, copied)
    subject.run(["merge"])
    assert subject.built in (["optimize", "convert", "merge"], ["optimize", "audit", "convert", "merge"])
    assert {path.name: path.read_bytes() for path in copied.glob("*/merge-*/onnx/*.onnx")} == before
