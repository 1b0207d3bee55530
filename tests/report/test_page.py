"""report.html: one file that shows a run, whatever its texts are, and is drawn by a real browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemma_tune.report.page import renew_report, write_report
from support.reported import finished_run

HOSTILE = '</div></style></script><script>alert(1)</script><img src=x onerror="alert(2)">&amp; {{ 7 * 7 }} "\' \x1b[31m \x00 \ud800 \u202egnp'


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture
def page(tmp_path):
    def made(text: str = "Is the margin falling?") -> Page:
        return Page(write_report(finished_run(tmp_path / "run", text)))

    return made


def test_it_tells_everything_about_a_run(page):
    found = page("毛利率在下降吗？")
    for said in ("google/gemma-3-270m-it", "4.225 → 2.940", "216 + 24", "18,000 / 30,000", "LoRA, r = 16", "Loss curves",
                 "Base against tuned", "arc_easy", "q5_k_m", "+3.30 %", "22", "毛利率在下降吗？", "467 tokens/s",
                 "gemma-tune prepare ../rows.jsonl", "--learning-rate 0.0002", "gemma-tune export-ollama --quant q8_0,q4_0",
                 "微调前后的指标", "drawn of 毛利率在下降吗？", "240 / 52,002",
                 "texts divided between both", "cut off at the limit", "no clear difference", "更好"):
        assert said in found.text, said
    assert "small.jsonl" not in found.text, "taken whole"
    assert found.open == []
    assert sum(tag == "svg" for tag, _ in found.tags) == 3 + 9, "curves, lengths, formats; an interval for each measure"


def test_what_is_about_an_earlier_adapter_is_left_out_and_named(tmp_path):
    run = finished_run(tmp_path / "run", "Is the margin falling?")
    assert "about an earlier adapter" not in Page(write_report(run)).text
    manifest = json.loads(run.manifest.read_text())
    stages = manifest["stages"]

    def item(path: str, sha256: str) -> dict[str, str]:
        return {"path": path, "sha256": sha256 * 64, "stamp": "s"}

    stages["train"]["outputs"]["adapter"] = item("m_lora_adapter", "0")
    stages["eval"]["inputs"]["adapter"] = stages["merge"]["inputs"]["adapter"] = item("m_lora_adapter", "0")
    stages["merge"]["outputs"]["merged"] = stages["export-ollama"]["inputs"]["merged"] = item("m_lora_merged", "2")
    run.manifest.write_text(json.dumps(manifest))
    assert "about an earlier adapter" not in Page(write_report(run)).text
    stages["train"]["outputs"]["adapter"]["sha256"] = "1" * 64  # trained anew since
    run.manifest.write_text(json.dumps(manifest))
    found = Page(write_report(run))
    assert "about an earlier adapter" in found.text and ": eval, merge, export-ollama. Run them again" in found.text
    assert "4.225 → 2.940" in found.text and "Loss curves" in found.text
    for said in ("Base against tuned", "arc_easy", "+3.30 %", "cut off at the limit", "greedy answers equal"):
        assert said not in found.text, said
    assert found.open == []


def test_data_of_after_the_training_are_not_shown_as_what_it_learned_from(tmp_path):
    run = finished_run(tmp_path / "run")
    manifest = json.loads(run.manifest.read_text())
    stages = manifest["stages"]

    def items(sha256: str) -> dict[str, dict[str, str]]:
        return {name: {"path": f"data/{name}", "sha256": sha256 * 64, "stamp": "s"} for name in ("train_rows", "valid_rows", "tokens")}

    def written() -> Page:
        run.manifest.write_text(json.dumps(manifest))
        return Page(write_report(run))

    stages["train"]["inputs"] = stages["prepare"]["outputs"] = items("0")
    found = written()
    assert "216 + 24" in found.text and "--learning-rate 0.0002" in found.text and "Other data were prepared" not in found.text
    stages["prepare"]["outputs"] = items("1")
    found = written()
    for said in ("216 + 24", "18,000 / 30,000", "Rows by length", "gemma-tune prepare", "The commands that reproduce it"):
        assert said not in found.text, said
    assert "Other data were prepared since the training" in found.text and "训练后数据已重新准备" in found.text
    assert "4.225 → 2.940" in found.text and "Base against tuned" in found.text and found.open == []


def test_of_an_adapter_from_elsewhere_the_merge_comes_before_the_comparison(tmp_path):
    run = finished_run(tmp_path / "run")
    text = Page(write_report(run)).text
    assert "train.yaml has every setting" in text and text.index("gemma-tune eval") < text.index("gemma-tune merge")
    manifest = json.loads(run.manifest.read_text())
    del manifest["stages"]["prepare"], manifest["stages"]["train"]
    run.manifest.write_text(json.dumps(manifest))
    text = Page(write_report(run)).text
    text = text[text.index("The commands that reproduce it"):]
    assert "train.yaml" not in text and text.index("gemma-tune merge") < text.index("gemma-tune eval")


def test_the_adapter_that_it_began_with_is_told(tmp_path):
    run = finished_run(tmp_path / "run")
    assert "起始适配器" not in Page(write_report(run)).text
    manifest = json.loads(run.manifest.read_text())
    manifest["stages"]["train"]["config"]["from_adapter"] = {"value": "../other/tiny-gemma_sft_adapter", "from": "flag"}
    run.manifest.write_text(json.dumps(manifest))
    assert "began with the adapter起始适配器tiny-gemma_sft_adapter" in Page(write_report(run)).text


def test_answers_that_are_not_shown_are_counted_in_both_languages(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_tune.report.contents._MOST_ANSWERS", 1)
    found = Page(write_report(finished_run(tmp_path / "run")))
    assert "2 more are in answers.json" in found.text and "另有 2 个回答在 answers.json 中" in found.text


def test_pictures_of_questions_are_named(tmp_path):
    run = finished_run(tmp_path / "run")
    answers = json.loads(run.answers.read_text())
    shown = {"role": "user", "content": "", "pictures": [{"at": 0, "file": f"pictures/{c * 64}.png"} for c in "ab"]}
    answers[0]["prompt"], answers[1]["prompt"] = [shown], [shown | {"content": "What is it?"}]
    answers[2]["prompt"] = []
    run.answers.write_text(json.dumps(answers))
    found = Page(write_report(run))
    assert found.text.count("shown图片: aaaaaaaa….png, bbbbbbbb….png") == 2
    assert "1. aaaaaaaa….png, bbbbbbbb….png" in found.text and "2. What is it?" in found.text and found.open == []


def test_nothing_comes_from_elsewhere_and_no_path_of_this_machine_is_told(page):
    found = page()
    assert not re.search(r"https?://|//\w|@import|url\(", found.source.replace("http-equiv", ""))
    assert {tag for tag, _ in found.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "form", "base"})
    assert not [value for _, attrs in found.tags for name, value in attrs.items() if name in ("src", "href", "action")]
    assert "/home/somebody" not in found.source


def test_texts_of_data_and_models_stay_texts(page):
    found = page(HOSTILE)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "img" not in {tag for tag, _ in found.tags}
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert found.text.count("<script>alert(1)</script>") >= 9 and "{{ 7 * 7 }}" in found.text
    assert not set(found.source) & set(map(chr, (*range(9), 0x1b, 0x7f))), "no control characters"
    assert found.open == []


def test_only_its_own_script_may_run(page):
    found = page(HOSTILE)
    [policy] = [attrs["content"] for tag, attrs in found.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    [script] = re.findall(r"<script>(.*?)</script>", found.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_access_tokens_are_not_shown(page):
    token = "hf_" + "aB3dE5fG7h" * 4
    assert token not in page(f"my token is {token}").source


@pytest.mark.parametrize("gone", ["answers.json", "data/report.json", "logs/metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "{", "[1, null]", '{"step": "x"}', '{"rows": 1e999}'])
def test_what_is_missing_or_damaged_is_left_out(tmp_path, gone, content):
    run = finished_run(tmp_path / "run")
    if content is None:
        (run.root / gone).unlink()
    else:
        (run.root / gone).write_text(content)
    found = Page(write_report(run))
    assert "Base against tuned" in found.text and "467 tokens/s" in found.text


@pytest.mark.parametrize("changed", [{"rows": None}, {"train_rows": [1]}, {"formats": "messages"}, {"rejected_by_reason": {"long": []}},
                                     {"kind": []}])
def test_one_figure_of_the_data_that_is_none_does_not_cost_the_page(tmp_path, changed):
    run = finished_run(tmp_path / "run")
    run.data_report.write_text(json.dumps(json.loads(run.data_report.read_text()) | changed))
    found = Page(write_report(run))
    assert "Base against tuned" in found.text and ("216 + 24" in found.text) == ("kind" in changed)


def test_token_ids_are_shown_where_answers_could_not_be_compared(tmp_path):
    """As an export records it without an engine that gives answers."""
    run = finished_run(tmp_path / "run")
    manifest = json.loads(run.manifest.read_text())
    manifest["stages"]["export-ollama"]["summary"]["parity"]["greedy"] = {"not_checked": "the engine was too slow"}
    run.manifest.write_text(json.dumps(manifest))
    found = Page(write_report(run))
    assert "Token ids of whole prompts" in found.text and "未对比贪心回答: the engine was too slow" in found.text
    assert "whole answers equal" not in found.text


@pytest.mark.parametrize("tasks", [{"arc": None}, {"arc": {"acc": {"base": 1}}}, {"arc": {"acc": {"base": ["a", None], "tuned": [1, 2]}}}])
def test_a_benchmark_that_is_damaged_does_not_cost_the_page(tmp_path, tasks):
    run = finished_run(tmp_path / "run")
    manifest = json.loads(run.manifest.read_text())
    manifest["stages"]["eval"]["summary"]["tasks"] = tasks
    run.manifest.write_text(json.dumps(manifest))
    found = Page(write_report(run))
    assert "Base against tuned" in found.text and "lm-evaluation-harness" not in found.text


@pytest.mark.parametrize("stages", [[], ["prepare"], ["prepare", "train"], ["merge"], ["prepare", "train", "eval"]])
def test_a_run_of_any_age_has_a_report(tmp_path, stages):
    run = finished_run(tmp_path / "run")
    manifest = json.loads(run.manifest.read_text())
    manifest["stages"] = {name: manifest["stages"][name] | {"summary": {}} for name in stages}
    run.manifest.write_text(json.dumps(manifest))
    assert "tiny-gemma" in Page(write_report(run)).text


def test_a_page_is_renewed_where_there_is_one_and_an_old_one_stays_where_it_cannot_be(tmp_path):
    run = finished_run(tmp_path / "run")
    renew_report(run.root)
    assert not run.html_report.exists(), "nobody has asked for one yet"
    write_report(run)
    manifest = json.loads(run.manifest.read_text())
    del manifest["stages"]["merge"]
    run.manifest.write_text(json.dumps(manifest))
    renew_report(run.root)
    page = run.html_report.read_text(encoding="utf-8")
    assert "Merged model against base" not in page and "Base against tuned" in page
    run.manifest.write_text("{")
    renew_report(run.root)
    assert run.html_report.read_text(encoding="utf-8") == page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_it_without_scrolling_sideways(page, tmp_path, width):
    """Chromium reports through the document's title what it laid out; the policy forbids scripts, so it is lifted."""
    import numpy as np
    from matplotlib.image import imread

    source = page("很长的一个词" * 20 + " " + "long" * 60).source
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    probe = ("<script>addEventListener('load', () => { document.title = 'wide ' + document.documentElement.scrollWidth "
             "+ ' of ' + innerWidth + ' tall ' + document.documentElement.scrollHeight; })</script></body>")
    (tmp_path / "probe.html").write_text(source.replace("</body>", probe), encoding="utf-8")
    # A window of Chromium is at least 500 wide, so a phone is a frame in one.
    frame = (f"<title>wait</title><iframe id=f src=probe.html width={width} height=800 style='border:0'></iframe><script>"
             "f.onload = () => setTimeout(() => { document.title = f.contentDocument.title }, 300)</script>")
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    common = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
              f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--window-size=1280,900"]
    done = subprocess.run([*common, "--dump-dom", (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=240)
    wide, inner, tall = map(int, re.search(r"wide (\d+) of (\d+) tall (\d+)", done.stdout).groups())
    assert inner == width and wide <= width, "the page is wider than the screen"
    assert tall > 1500
    picture = tmp_path / "page.png"
    subprocess.run([*common, f"--screenshot={picture}", (tmp_path / "frame.html").as_uri()], capture_output=True, timeout=240,
                   check=True)
    drawn = imread(picture)[:800, :width, :3]
    assert len(np.unique((drawn * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 30, "an empty page has few colours"


def test_what_the_export_sees_with_is_told(tmp_path):
    run = finished_run(tmp_path / "run", "Is the margin falling?")
    content = json.loads(run.manifest.read_text())
    summary = content["stages"]["export-ollama"]["summary"]
    assert "pictures" not in Page(write_report(run)).text and "图片" not in Page(write_report(run)).text

    def shown(**figures) -> str:
        summary.update(figures)
        run.manifest.write_text(json.dumps(content))
        return " ".join(Page(write_report(run)).text.split())

    alone = shown(text_alone="what is exported takes text alone, though the merged model takes <b>pictures</b>: --no-vision")
    assert "though the merged model takes <b>pictures</b>: --no-vision" in alone and "导出的模型只接受文本" in alone
    seeing = {"file": "mmproj-m-f16.gguf", "bytes": 855_000_000, "senses": ["vision"]}
    told = shown(projector=seeing)
    assert "With mmproj-m-f16.gguf (855 MB) each of them takes pictures, as the base model does" in told
    assert "以上各文件与基础模型一样可读取图片" in told and "answered about a picture" not in told and "text alone" not in told
    told = shown(projector=seeing | {"senses": ["vision", "audio"], "engine": "llama.cpp 1", "pictures_apart": 0.456})
    assert "takes pictures and sounds, as" in told and "可读取图片和声音" in told
    assert "llama.cpp 1 answered about a picture" in told and "differ by up to" in told and "45.6 %" in told


def test_a_good_file_of_an_earlier_export_is_among_the_formats(tmp_path):
    run = finished_run(tmp_path / "run", "Is the margin falling?")
    content = json.loads(run.manifest.read_text())
    summary = content["stages"]["export-ollama"]["summary"]
    content["stages"]["merge"]["outputs"]["merged"] = {"path": "tiny-gemma_lora_merged", "sha256": "m", "stamp": "s"}
    left = {"bytes": 3, "perplexity": 20.0, "f16_perplexity": 16.0, "stale": False}
    summary["earlier"] = {"q5_1": left | {"merged": "m"}, "q5_0": left | {"merged": "another"}, "q4_1": left | {"merged": "m"}}
    for quant in ("q5_1", "q5_0"):
        run.ollama.mkdir(exist_ok=True)
        (run.ollama / f"{run.model_name}-{quant}.gguf").write_bytes(b"abc")
    run.manifest.write_text(json.dumps(content))
    found = Page(write_report(run)).text
    assert "q5_1 ★" in found and "+25.00 %" in found and "q5_0" not in found and "q4_1" not in found
