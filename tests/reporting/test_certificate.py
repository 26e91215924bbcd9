"""The certificate has the results of `verify`, needs no other file, and is readable on a phone."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from accel.models.loading import verification_of
from accel.pipeline.store import Artifact
from accel.reporting.certificate import page
from accel.runtime.layout import first_variant
from tests.conftest import Build

pytestmark = pytest.mark.xdist_group("certificate")  # the worker that builds the embedded model looks at it
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
PHONE = 390  # width in CSS pixels


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "fp32")])
def stage_artifacts(request: pytest.FixtureRequest, build: Build) -> dict[str, Artifact]:
    """Artifacts of the embedded model, which has texts and metrics."""
    overrides = [f"precision={request.param}", "model.references=heldout.tsv", "verify.references=50"]
    overrides += ["verify.unique_tokens=false", f"verify.latency={request.param == 'fp32'}"]
    if request.param == "fp16":
        overrides.append(
            "optimize.passes.precompute_position_bias=false"
        )  # with the pass no node stays in FP32, and there is no reason to show
    return build("accel://t5-g2p", "[convert,verify]", overrides)[1]


def test_content(stage_artifacts: dict[str, Artifact]) -> None:
    """The certificate has result, inputs and packages, latency if measured, and in FP16 the nodes kept in FP32."""
    folder = stage_artifacts["verify"].folder
    certificate = json.loads(first_variant(folder).certificate.read_text())
    assert certificate["verification"] == verification_of(folder)
    assert certificate["compared"] | {"inputs": 8, "kind": "texts", "num_beams": 4} == certificate["compared"]
    assert certificate["packages"]["torch"].startswith("2.")
    assert len(certificate["verification"]["drift"]["p99"]) > 5
    for mean, p99, worst in zip(
        *(certificate["verification"]["drift"][key] for key in ("mean", "p99", "worst")), strict=True
    ):
        assert 0 < mean < p99 < worst
    if certificate["verification"]["precision"] == "float32":
        speed = certificate["speed"]
        assert speed["backends"].keys() == {"torch_cache", "onnx_merged"}
        assert speed["ratio"] == pytest.approx(
            speed["backends"]["torch_cache"]["seconds"]["median"]
            / speed["backends"]["onnx_merged"]["seconds"]["median"]
        )
        for figures in speed["backends"].values():
            first, later = figures["time_to_first_token_ms"]["median"], figures["time_per_output_token_ms"]["median"]
            total = 1000 * figures["seconds"]["median"]
            assert first > 0
            assert first + (speed["new_tokens"] - 1) * later == pytest.approx(total)
        assert min(figures["peak_memory"] for figures in speed["backends"].values()) > 10**6
        assert "kept" not in certificate
    else:
        assert certificate["speed"] is None
        assert certificate["mix"] == stage_artifacts["convert"].summary
        assert {node["component"] for node in certificate["kept"]} == {"encoder", "prefill", "decode"}
        assert certificate["statistics"]["decode"]["logits"][0] > 1
    assert str(Path.home()) not in json.dumps(certificate)
    assert str(folder) not in json.dumps(certificate)


class PageParser(HTMLParser):
    """Parser that collects a page's tags, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_page_needs_no_other_file(stage_artifacts: dict[str, Artifact]) -> None:
    """The page has no script, style sheet or external image, and its text has the certificate's numbers."""
    html = first_variant(stage_artifacts["verify"].folder).certificate_page.read_text(encoding="utf-8")
    parsed = PageParser()
    parsed.feed(html)
    assert not parsed.tags & {"script", "link", "img", "iframe"}
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\((?!#)", html)
    verification = verification_of(stage_artifacts["verify"].folder)
    assert verification is not None
    text = " ".join(parsed.text.split())
    assert f"exact match {verification['metrics']['pytorch']['exact_match']:.2f}%" in text
    for name in verification["identical"]:
        assert name in text
    assert parsed.tags >= {"svg", "table"}
    assert ("largest float16" in text) == (verification["precision"] == "float16")


def test_inputs_and_outputs_are_escaped(stage_artifacts: dict[str, Artifact]) -> None:
    """HTML's special characters in inputs and outputs are escaped."""
    certificate = json.loads(first_variant(stage_artifacts["verify"].folder).certificate.read_text())
    certificate["verification"]["differing"] = [
        {"case": "greedy", "input": "<script>alert(1)</script>", "position": 3, "pytorch": "a & b", "ours": "<b>"}
    ]
    html = page.render(certificate)
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a &amp; b" in html


def test_near_ties(stage_artifacts: dict[str, Artifact]) -> None:
    """With weights in low bits the page has all three counts, and what each difference needs."""
    certificate = json.loads(first_variant(stage_artifacts["verify"].folder).certificate.read_text())
    text = {"input": "a", "position": 3, "pytorch": "b", "ours": "c"}
    certificate["verification"] |= {
        "identical": {"greedy": 1.0, "sampling": 0.5, "padded": 0.25},
        "sequences": {"greedy": 4, "sampling": 4, "padded": 8},
        "near_ties": {"greedy": 0, "padded": 5},
        "needed_divergence": {"padded.3": 0.00123},
        "differing": [{"key": "padded.3", "case": "padded"} | text],
    }
    parsed = PageParser()
    parsed.feed(page.render(certificate))
    shown = " ".join(parsed.text.split())
    for row in (
        "greedy 4 100% 0 0 none",
        "sampling 4 50.00% - 2",
        "padded (greedy) 8 25.00% 5 1",
        "padded a 3 0.00123 b c",
    ):
        assert row in shown, shown


def test_nothing_stays_in_fp32(stage_artifacts: dict[str, Artifact]) -> None:
    """A sentence replaces a table without rows."""
    certificate = json.loads(first_variant(stage_artifacts["verify"].folder).certificate.read_text())
    sentence = "No node has to stay in FP32."
    assert sentence not in page.render(certificate)
    assert (sentence in page.render(certificate | {"kept": []})) == ("mix" in certificate)


def test_speed(stage_artifacts: dict[str, Artifact]) -> None:
    """The page shows each backend's times with their spread, and a dash for those that an old certificate lacks."""
    certificate = json.loads(first_variant(stage_artifacts["verify"].folder).certificate.read_text())
    figures = {"seconds": {"median": 0.25, "min": 0.2, "max": 1.5}, "peak_memory": 2e6}
    times = {
        "time_to_first_token_ms": {"median": 12.345, "min": 11, "max": 1300},
        "time_per_output_token_ms": {"median": 0.5, "min": 0.4, "max": 0.625},
    }
    speed = {"ratio": 2.0, "new_tokens": 8, "source_length": 16, "repeats": 5}
    speed["compute_dtype"] = certificate["verification"]["precision"]
    for shown, cells in ((times, ["12.35 [11.00 to 1300.00]", "0.50 [0.40 to 0.62]"]), ({}, ["-", "-"])):
        html = page.render(certificate | {"speed": speed | {"backends": {"onnx_merged": figures | shown}}})
        row = re.findall(r'<td class="n">([^<]*)</td>', html[html.index("this model (onnx_merged)") :])[:5]
        assert row == ["5", "0.250 [0.200 to 1.500]", *cells, "2.0 MB"]


def test_shares_are_not_rounded_up_to_100() -> None:
    """Only a share of 1 is shown as 100%."""
    assert page.share(1.0) == "100%"
    assert page.share(0.99999) == "99.99%"
    assert page.share(0.5) == "50.00%"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_layout_on_a_phone_and_in_print(stage_artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    """In a browser, nothing is wider than the screen, plots fill the width, letters are large, and it prints to PDF."""
    shutil.copy(first_variant(stage_artifacts["verify"].folder).certificate_page, tmp_path / "page.html")
    (tmp_path / "phone.html").write_text(
        f"""<body style="margin:0">
        <iframe id="f" src="page.html" width="{PHONE}" height="1500" style="border:0"></iframe>
        <script>f.onload = () => {{
            const page = f.contentDocument, all = (which) => [...page.querySelectorAll(which)];
            const plots = all("figure svg").map((each) => each.getBoundingClientRect().width);
            const letters = all("p, td").map((each) => parseFloat(getComputedStyle(each).fontSize));
            document.title = JSON.stringify(
                [page.documentElement.scrollWidth, Math.min(...plots), Math.min(...letters)]);
        }};</script></body>"""
    )
    dumped = _chromium(tmp_path, "--dump-dom", "phone.html")
    wide, plot, letters = json.loads(re.search(r"<title>(.*?)</title>", dumped)[1])  # type: ignore[index]
    assert wide <= PHONE
    assert plot > 0.8 * PHONE
    assert letters >= 12
    _chromium(tmp_path, "--screenshot=phone.png", "phone.html")
    pixels = imread(tmp_path / "phone.png")[..., :3]
    assert pixels.shape[1] >= PHONE
    drawn = pixels[:, :PHONE]
    assert 0.02 < (drawn.min(axis=2) < 0.5).mean() < 0.5  # letters and lines on white
    assert np.median(drawn) == 1
    _chromium(tmp_path, "--print-to-pdf=page.pdf", "page.html")
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 1 <= pages <= 12


def _chromium(folder: Path, action: str, name: str) -> str:
    """Open a page in headless Chromium, and return what it prints."""
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *OFFLINE),
            *("--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--window-size=800,1500"),
            *("--virtual-time-budget=5000", action, (folder / name).as_uri()),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout
