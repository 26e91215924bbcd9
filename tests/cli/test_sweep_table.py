"""Sweep table: one row per job, failed ones included, rewritten after every job."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accel.cli import sweep_table, verification_cells
from tests.conftest import Build


def _settings(folder: Path, number: int) -> Any:
    return SimpleNamespace(sweep=SimpleNamespace(dir=str(folder)), job=SimpleNamespace(num=number))


def _summary(new_tokens: int, seconds: float) -> dict[str, Any]:
    def figures(factor: float) -> dict[str, Any]:
        total = factor * seconds
        times = {"time_to_first_token_ms": {"median": 100 * total}, "time_per_output_token_ms": {"median": 4.567}}
        values = {"total": {"median": total}, **times, "vs_torch_cache": 2.5 / factor}
        return values | {"vs_two_files": None, "last_over_first": 1.04, "compiled": False, "repeats": 3}

    return {
        "point": {"new_tokens": new_tokens},
        "backends": {"torch_cache": figures(2.5), "torch_static_compiled": figures(2), "onnx_merged": figures(1)},
        "session_ratios": {"session": 1.08},
        "machine": {"device": "a GPU"},
        "precision": "float16",
        "ignored": "x" * 1000,
    }


def test_table_after_every_job(tmp_path: Path) -> None:
    """The table is complete after every job, failed jobs included; a job that runs again replaces its row."""
    common = ["model=tiny", "+sweep=latency"]
    first = [*common, "benchmark.new_tokens=8", "benchmark.num_beams=1"]
    second = [*common, "benchmark.new_tokens=16", "benchmark.num_beams=1"]
    third = [*common, "benchmark.new_tokens=16", "benchmark.num_beams=0"]
    table = sweep_table.record(_settings(tmp_path, 0), first, {"benchmark": _summary(8, 0.125)}, None)
    assert "| 8 |" in table.read_text()
    sweep_table.record(_settings(tmp_path, 2), third, {}, "benchmark.num_beams=0: must be\nfrom 1 | up")
    sweep_table.record(_settings(tmp_path, 1), second, {}, "out of memory")
    sweep_table.record(_settings(tmp_path, 1), second, {"benchmark": _summary(16, 0.25)}, None)
    lines = table.read_text().splitlines()
    assert lines[0] == "In all jobs: `model=tiny` `sweep=latency`"
    assert lines[2] == "On a GPU, float16."
    drawn = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert drawn[0] == [
        "benchmark.new_tokens",
        "benchmark.num_beams",
        "torch_cache (s)",
        "torch_static_compiled (s)",
        "onnx_merged (s)",
        "x torch_cache",
        "x two_files",
        "last/first",
        "session ratio",
        "error",
    ]
    assert drawn[2][:9] == [
        "8",
        "1",
        "0.312 [31.2, 4.57]",
        "0.250 [25.0, 4.57] (not compiled)",
        "0.125 [12.5, 4.57]",
        "2.50",
        "-",
        "1.04",
        "1.08",
    ]
    assert drawn[3][:9] == [
        "16",
        "1",
        "0.625 [62.5, 4.57]",
        "0.500 [50.0, 4.57] (not compiled)",
        "0.250 [25.0, 4.57]",
        "2.50",
        "-",
        "1.04",
        "1.08",
    ]
    assert drawn[4] == [
        "16",
        "0",
        "-",
        "-",
        "-",
        "-",
        "-",
        "-",
        "-",
        "benchmark.num_beams=0: must be from 1 \\| up",
    ]
    jobs = json.loads((tmp_path / sweep_table.RECORD).read_text())
    assert [job["number"] for job in jobs] == [0, 1, 2]
    for plot in sweep_table.PLOTS:
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp"))
    assert sweep_table.TIMES in lines


def test_jobs_without_token_times(tmp_path: Path) -> None:
    """One new token has no time per output token, and jobs that an older version recorded have neither time."""
    one, old = _summary(1, 0.125), _summary(8, 0.25)
    for values in one["backends"].values():
        values["time_per_output_token_ms"] = None
    for values in old["backends"].values():
        del values["time_to_first_token_ms"], values["time_per_output_token_ms"]
        values["ms_per_token"] = 31.25
    table = sweep_table.record(_settings(tmp_path, 0), ["benchmark.new_tokens=8"], {"benchmark": old}, None)
    assert {path.name for path in tmp_path.glob("*.png")} == {sweep_table.TOTALS, sweep_table.SPEED_UP}
    sweep_table.record(_settings(tmp_path, 1), ["benchmark.new_tokens=1"], {"benchmark": one}, None)
    drawn = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("|")]
    assert [row[:2] for row in drawn[2:]] == [["8", "0.625"], ["1", "0.312 [31.2, -]"]]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        *(sweep_table.TOTALS, sweep_table.FIRST_TOKEN, sweep_table.SPEED_UP)
    }


def test_sweep_without_results(tmp_path: Path) -> None:
    """A sweep in which all jobs fail or measure nothing still writes its table."""
    sweep_table.record(_settings(tmp_path, 0), ["stage=merge", "model=a"], {}, None)
    table = sweep_table.record(_settings(tmp_path, 1), ["stage=merge", "model=b"], {}, "unknown model")
    assert [line for line in table.read_text().splitlines() if line.startswith("|")] == [
        "| model | error |",
        "| --- | --- |",
        "| a |  |",
        "| b | unknown model |",
    ]
    assert not list(tmp_path.glob("*.png"))


def test_unexpected_error_in_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error ends its own job only: the others run, and all have a row."""
    from accel.cli import application

    def run(composed: Any, overrides: list[str]) -> dict[str, Any]:
        if composed.benchmark.new_tokens == 8:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"benchmark": _summary(composed.benchmark.new_tokens, 0.5)}

    monkeypatch.setattr(application, "run", run)
    monkeypatch.setattr(sys, "argv", ["accel", "-m", "benchmark.new_tokens=4,8,16", f"hydra.sweep.dir={tmp_path}"])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        application.main()
    jobs = json.loads((tmp_path / sweep_table.RECORD).read_text())
    assert [job["error"] for job in jobs] == [None, "RuntimeError: CUDA error: an illegal memory access", None]
    assert [bool(job["backends"]) for job in jobs] == [True, False, True]


@pytest.mark.slow
def test_multirun(build: Build, tiny: Path, shared: Path, tmp_path: Path) -> None:
    """On the command line, all jobs share one export; after a failed job the sweep continues and exits with 2."""
    build(tiny, "verify")
    exports = set((shared / "artifacts" / tiny.name).glob("export-*/manifest.json"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accel", "-m", "+sweep=latency", "model=auto", f"model.checkpoint={tiny}"),
            *(f"artifacts={shared / 'artifacts'}", "runtime=cpu", "verify.unique_tokens=true"),
            *("benchmark.new_tokens=3,4", "benchmark.num_beams=0,2", "benchmark.source_length=4"),
            *("benchmark.memory=false", "benchmark.repeats=1", f"hydra.sweep.dir={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    jobs = json.loads((tmp_path / sweep_table.RECORD).read_text())
    assert [job["overrides"]["benchmark.num_beams"] for job in jobs] == ["0", "2", "0", "2"]
    assert ["must be from 1" in (job["error"] or "") for job in jobs] == [True, False, True, False]
    assert [set(job["backends"]) != set() for job in jobs] == [False, True, False, True]
    table = (tmp_path / sweep_table.TABLE).read_text()
    assert table.count("benchmark.num_beams=0") == 2
    assert exports == set((shared / "artifacts" / tiny.name).glob("export-*/manifest.json"))


def test_rows_of_a_precision_sweep(tmp_path: Path) -> None:
    """The row of a job has the results of verify, whether the bundle passed or failed."""
    passed = {
        **{"passed": True, "execution": "emulated", "identical": {"greedy": 1.0, "beams": 0.875}},
        "metrics": {"pytorch": {"exact_match": 76.0}, "ours": {"exact_match": 75.5}},
        **{"worst_logits": 0.0123, "fp32_nodes": 12, "casts": 3, "decoder_bytes": 1.26e6},
        "speed": {"ratio": 2.5, "backends": {"onnx_merged": {"seconds": {"median": 0.125}}}},
    }
    failed = passed | {"passed": False, "identical": {}, "metrics": {}, "worst_logits": None, "speed": None}
    sweep_table.record(_settings(tmp_path, 0), ["precision=fp16"], {"verify": passed}, None)
    table = sweep_table.record(_settings(tmp_path, 1), ["precision=fp16-blanket"], {"verify": failed}, "failed")
    drawn = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("|")]
    assert drawn[0] == [
        *("precision", "passed", "greedy as PyTorch", "beams as PyTorch", "logits off by", "exact match"),
        *("nodes in FP32", "casts", "decoder MB", "error"),
    ]
    kept = ["12", "3", "1.3"]
    assert drawn[2][:9] == [*("fp16", "yes, emulated", "100.0%", "87.5%", "1.2e-02", "75.50% (76.00%)", *kept)]
    assert "For speed and memory run the sweep on a GPU" in table.read_text()  # an emulation's say nothing
    assert drawn[3] == [
        "fp16-blanket",
        "no, emulated",
        "-",
        "-",
        "not finite",
        "-",
        *kept,
        "failed",
    ]


def test_low_bits_beside_fp32(tmp_path: Path) -> None:
    """Size, session memory, speed, tokens, metric and divergence in one table and one plot, each where it is known."""
    full = {
        **{"passed": True, "execution": "native", "identical": {"greedy": 1.0, "padded": 1.0}},
        "metrics": {"pytorch": {"word_error_rate": 6.46}, "ours": {"word_error_rate": 6.46}},
        **{"worst_logits": 1.9e-5, "fp32_nodes": "all", "casts": 0, "decoder_bytes": 166e6, "low_bit_share": None},
        "speed": {
            "ratio": 2.0,
            "backends": {
                "torch_cache": {"seconds": {"median": 0.25}},
                "onnx_merged": {"seconds": {"median": 0.125}, "session_memory": 173e6},
            },
        },
    }
    divergence = {"tokens": 512, "texts": 60, "changed": 4, "mean": 0.0011, "standard_error": 0.0003, "allowed": 0.02}
    low = full | {
        **{"low_bit_share": 0.975, "divergence": divergence, "decoder_bytes": 44e6, "fp32_nodes": 0, "speed": None},
        "metrics": {"pytorch": {"word_error_rate": 6.46}, "ours": {"word_error_rate": 6.62}},
    }
    sweep_table.record(_settings(tmp_path, 0), ["precision=fp32"], {"verify": full}, None)
    assert not list(tmp_path.glob("*.png"))  # nothing to compare yet
    table = sweep_table.record(_settings(tmp_path, 1), ["precision=int8"], {"verify": low}, None)
    names, _, first, second = [
        line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("|")
    ]
    rows = [dict(zip(names, cells, strict=True)) for cells in (first, second)]
    shared = {"passed": "yes, native", "greedy as PyTorch": "100.0%", "padded as PyTorch": "100.0%"}
    shared |= {"logits off by": "1.9e-05"}
    assert rows[0] == shared | {
        **{"precision": "fp32", "word error rate": "6.46% (6.46%)", "nodes in FP32": "all", "casts": "0"},
        **{"decoder MB": "166.0", "session MB": "173.0", "seconds": "0.125", "x PyTorch": "2.00"},
        **{"divergence": "-", "low bits": "-"},
    }
    assert rows[1] == shared | {
        **{"precision": "int8", "word error rate": "6.62% (6.46%)", "nodes in FP32": "-", "casts": "-"},
        **{"decoder MB": "44.0", "session MB": "-", "seconds": "-", "x PyTorch": "-"},
        **{"divergence": "0.0011 ± 0.0003", "low bits": "97.5%"},
    }
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = {"decoder weights (MB)": 44.0, "identical sequences, greedy (%)": 100.0, "word error rate (%)": 6.62}
    assert verification_cells.figures(low) == shown | {"divergence (nats)": 0.0011}
    emulated = verification_cells.figures(full | {"execution": "emulated"})
    assert emulated == shown | {"decoder weights (MB)": 166.0, "word error rate (%)": 6.46}
    native = {"decoder session (MB)": 173.0, "generation (ms)": 125.0}
    assert verification_cells.figures(full) == emulated | native
