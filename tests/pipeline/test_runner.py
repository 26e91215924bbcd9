"""Which stages run, on what they depend, and that a kill costs no more than the stage it hit."""

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
from accel.pipeline.runner import HIDDEN, Pipeline, load_stage, restrict_config, select_stages
from accel.pipeline.stage import Stage
from accel.pipeline.store import Artifact
from accel.system import host_memory
from tests.conftest import Build, overrides_for

BEFORE_GENERATE = (*HIDDEN, *STAGES[: STAGES.index("generate")])
CAUSAL = "accel.architectures.causal"
AFTER_MERGE = ("merge", "verify", "generate", "benchmark", "profile")


@cache
def composed(tiny: Path, *overrides: str) -> Config:
    """The settled config; composing takes a quarter of a second."""
    return compose(overrides_for(tiny, Path("unused"), *overrides))


def pipeline(tiny: Path, root: Path, *overrides: str) -> Pipeline:
    """A pipeline over the tiny checkpoint that has run nothing yet."""
    config = replace(composed(tiny, *overrides), artifacts=str(root))
    return Pipeline(config, registry.build(config.architecture))


def keys(tiny: Path, *overrides: str) -> dict[str, str]:
    """Key of every stage."""
    config = composed(tiny, *overrides)
    found = Pipeline(config, registry.build(config.architecture))
    return {name: found.key(name) for name in (*HIDDEN, *STAGES)}


def changed(tiny: Path, *overrides: str) -> set[str]:
    """The stages whose key `overrides` change."""
    before, after = keys(tiny), keys(tiny, *overrides)
    return {name for name in before if before[name] != after[name]}


# what is chosen


def test_chosen_stages_come_in_their_order() -> None:
    """`all`, one name or a list in any order: the stages run in the order of the pipeline."""
    assert select_stages("all") == list(STAGES)
    assert select_stages("all", mixed=False) == [name for name in STAGES if name != "audit"]
    assert select_stages(["all", "audit"], mixed=False) == list(STAGES)
    assert select_stages("merge") == ["merge"]
    assert select_stages(["verify", "export", "merge", "export"]) == ["export", "merge", "verify"]
    for hidden in HIDDEN:
        assert hidden not in select_stages("all")


@pytest.mark.parametrize("stage", ["exports", ["export", "exports"], "checkpoint", "", None, 3, ["all", 1]])
def test_unknown_stage_is_named_with_the_choices(stage: object) -> None:
    """The message holds the value and every stage there is."""
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
    assert select_stages(["all"]) == list(STAGES)


# what a stage may see


def test_only_resets_what_a_stage_did_not_declare() -> None:
    """Of a config in which everything differs from its default, a stage sees its own sections and defaults."""
    config = Config(artifacts="elsewhere", generate={"num_beams": 3})
    config.benchmark.source_length = 7
    config.merge.flag = "use_cache_branch"
    config.export.seed = 5
    seen = restrict_config(config, ("merge",))
    assert seen == Config(merge=config.merge)
    assert restrict_config(config, ()) == Config()
    assert config.export.seed == 5


def test_every_stage_declares_what_it_reads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage runs with the config that its key is made of, and no other section reaches it."""
    seen: dict[str, Config] = {}
    toys(monkeypatch, lambda name, config, folder: seen.__setitem__(name, config))
    subject = pipeline(tiny, tmp_path, "benchmark.source_length=9", "export.seed=4", "+generate.num_beams=2")
    subject.run(select_stages("all"))
    assert set(seen) >= set(STAGES)
    for name, config in seen.items():
        assert config == restrict_config(subject.config, load_stage(name).sections)
    assert seen["merge"].benchmark == Config().benchmark
    assert seen["merge"].generate == {}


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
        "artifacts=elsewhere",
        "stage=merge",
    ],
)
def test_lengths_and_beams_are_in_no_key_before_generate(tiny: Path, override: str) -> None:
    """So that a sweep over them exports, merges and verifies once."""
    assert changed(tiny, override) & set(BEFORE_GENERATE) == set()


@pytest.mark.parametrize(
    ("override", "made_anew", "kept"),
    [
        ("benchmark.new_tokens=99", {"benchmark"}, {"generate", "profile"}),
        ("profile.new_tokens=99", {"profile"}, {"generate", "benchmark"}),
        ("+generate.num_beams=3", {"generate"}, {"benchmark", "profile"}),
        ("merge.flag=use_cache_branch", set(AFTER_MERGE), {"checkpoint", "reference", "export", "optimize", "convert"}),
        ("optimize.passes.simplify=false", {"optimize", *AFTER_MERGE}, {"checkpoint", "reference", "export"}),
        ("export.opset=21", {"export", "optimize", *AFTER_MERGE}, {"checkpoint", "reference"}),
        ("verify.seed=9", {"reference", "verify"}, {"checkpoint", "export", "optimize", "convert", "merge"}),
        ("runtime.threads=1", {"verify", "benchmark", "profile"}, {"checkpoint", "export", "optimize", "reference"}),
        ("precision=fp16", {"convert", *AFTER_MERGE}, {"checkpoint", "export", "optimize"}),
        ("audit.seed=5", {"calibrate", "audit"}, {"checkpoint", "reference", "export", "optimize", "convert"}),
        ("audit.trials=0", {"audit"}, {"calibrate", "reference", "convert"}),
        ("precision.plan=rules", {"audit", "verify"}, {"calibrate", "reference", "convert"}),  # FP32 has no plan
        ("verify.max_metric_loss=5", {"verify"}, {"reference", "merge"}),
    ],
)
def test_a_value_reaches_the_stages_that_use_it(tiny: Path, override: str, made_anew: set[str], kept: set[str]) -> None:
    """Every stage downstream of a changed value is made anew, and none upstream."""
    found = changed(tiny, override)
    assert made_anew <= found
    assert not kept & found


def test_keys_depend_on_the_weights(tiny: Path, tmp_path: Path) -> None:
    """One bit of the checkpoint more or less makes everything anew; the folder's name makes nothing anew."""
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
    """Another adapter source, or another version of a package that a stage uses, is another artifact."""
    before = keys(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(module, "adapter_source", lambda config, adapter: "other source")
        after = keys(tiny)
    assert {name for name in before if before[name] != after[name]} >= {"export", "merge", "verify"}
    monkeypatch.setattr(module, "versions", lambda names: dict.fromkeys(names, "0") if "onnxscript" in names else {})
    after = keys(tiny)
    assert before["export"] != after["export"]


def test_keys_depend_on_the_code_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own module's and that of every module it leads to; a docstring or a comment changes nothing."""
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
    """A wrapper's code counts as the adapter's own does, and so does the code of a class that was typed in."""
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


def test_keys_depend_on_code_that_was_typed_in() -> None:
    """A class of a notebook has no file: what its functions were compiled to counts."""
    hashes = set()
    for number in (1, 1, 2):
        space: dict[str, Any] = {"__name__": "__main__", "Causal": importlib.import_module(CAUSAL).Causal}
        exec(f"class Mine(Causal):\n    def components(self):\n        return {number}, [i for i in 'ab']\n", space)
        hashes.add(source.adapter_source({}, space["Mine"]()))
    assert len(hashes) == 2


# toy stages: the real ones' names, inputs and sections, and next to no work


def toys(monkeypatch: pytest.MonkeyPatch, work: Callable[[str, Config, Path], Any]) -> None:
    """Let every stage of a pipeline call `work(name, config, folder)` and write one file."""

    def toy(name: str) -> Stage:
        def run(config: Config, inputs: Mapping[str, Artifact], architecture: Any, out: Path) -> Mapping[str, Any]:
            for upstream in inputs.values():
                assert (upstream.folder / "made").exists() or upstream.manifest.stage == "checkpoint"
            (out / "half").write_text(name)
            work(name, config, out)
            (out / "made").write_text(name)
            return {}

        return replace(load_stage(name), run=run)

    known = {name: toy(name) for name in (*HIDDEN, *STAGES)}
    monkeypatch.setattr(Pipeline, "stage", lambda self, name: known[name])
    monkeypatch.setattr(host_memory, "release", lambda: None)  # collecting garbage takes longer than these stages


def order_of_all(tiny: Path, root: Path) -> list[str]:
    """The order in which a fresh `stage=all` makes its artifacts."""
    fresh = pipeline(tiny, root)
    fresh.run(select_stages("all"))
    return fresh.built


def killed_at(victim: str, tiny: Path, root: Path) -> int:
    """Run `stage=all` in a process that is killed in the middle of stage `victim`. Returns its exit signal."""
    child = os.fork()
    if child == 0:
        try:
            with pytest.MonkeyPatch.context() as patch:
                toys(patch, lambda name, *_: os.kill(os.getpid(), signal.SIGKILL) if name == victim else None)
                pipeline(tiny, root).run(select_stages("all"))
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_kill_at_every_stage(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in any stage, the next run finishes and repeats nothing that was finished."""
    toys(monkeypatch, lambda *_: None)
    order = order_of_all(tiny, tmp_path / "whole")
    assert set(STAGES) <= set(order)
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
def test_stage_alone_makes_or_reuses_what_it_needs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Alone on an empty store it makes what it needs and no more; after those it makes itself alone."""
    toys(monkeypatch, lambda *_: None)
    fresh = pipeline(tiny, tmp_path / "a")
    fresh.run([name])
    assert set(fresh.built) == {name} | fresh._upstream(name) - {"checkpoint"}
    assert fresh.built[-1] == name
    before = pipeline(tiny, tmp_path / "b")
    before.run(sorted(fresh._upstream(name) - {"checkpoint"}))
    second = pipeline(tiny, tmp_path / "b")
    second.run([name])
    assert second.built == [name]


def test_nothing_is_made_from_deleted_intermediates(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the deployable at hand, deleted intermediates are not made again, not even by stages after it."""
    toys(monkeypatch, lambda *_: None)
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
    """A damaged export is rebuilt when merge must be, and what hangs on it by key alone stays."""
    toys(monkeypatch, lambda *_: None)
    order_of_all(tiny, tmp_path)
    (merge,) = tmp_path.glob("*/merge-*[!k]")
    (convert,) = tmp_path.glob("*/convert-*[!k]")
    shutil.rmtree(merge)
    (convert / "made").write_text("broken")
    second = pipeline(tiny, tmp_path)
    second.run(["merge"])
    assert second.built == ["convert", "merge"]


def test_the_folder_that_a_run_names_is_undamaged(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in the deployable of a finished run: named, and made again, though nothing else needs it."""
    toys(monkeypatch, lambda *_: None)
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
    """A copy of the artifacts that lead to the tiny model's deployable."""
    config, _ = build(tiny, "[export,optimize,audit,convert,merge,verify]")
    subject = Pipeline(config, registry.build(config.architecture))
    for name in (*HIDDEN, *STAGES[: STAGES.index("generate")]):
        found = subject.find(name)
        if found is not None and name != "checkpoint":
            shutil.copytree(found.folder, tmp_path / found.folder.relative_to(artifacts))
    return tmp_path


def test_verified_without_its_intermediates(copied: Path, tiny: Path) -> None:
    """The deployable of a real run is reused after everything that led to it was deleted."""
    for name in ("export", "optimize", "audit", "convert", "merge", "reference"):
        for folder in copied.glob(f"*/{name}-*"):
            shutil.rmtree(folder)
    subject = pipeline(tiny, copied)
    found = subject.run(["verify"])
    assert subject.built == []
    assert (found["verify"].folder / "decoder_model_merged.onnx").is_file()


def test_real_stages_resume(copied: Path, tiny: Path) -> None:
    """Without optimize's and later artifacts, a run makes those from the export that is there, to the same bytes."""
    before = {path.name: path.read_bytes() for path in copied.glob("*/merge-*/*.onnx")}
    assert before
    for name in ("optimize", "audit", "convert", "merge", "verify"):
        for folder in copied.glob(f"*/{name}-*"):
            shutil.rmtree(folder)
    subject = pipeline(tiny, copied)
    subject.run(["merge"])
    assert subject.built in (["optimize", "convert", "merge"], ["optimize", "audit", "convert", "merge"])
    assert {path.name: path.read_bytes() for path in copied.glob("*/merge-*/*.onnx")} == before
