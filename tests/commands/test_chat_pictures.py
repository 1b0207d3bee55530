"""``chat`` about pictures, through the real command line: as transformers answers with the model, adapter and picture."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from gemma_tune.answers.generation import answer_of, prompt_ids
from gemma_tune.answers.prompts import Prompt
from gemma_tune.answers.stream import Pieces
from gemma_tune.base.checkpoint import read_config
from gemma_tune.chat import llama, local
from gemma_tune.chat.pictures import Shown
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.gguf.engine import Engine
from gemma_tune.lora.load import add_adapter
from gemma_tune.models import looking
from gemma_tune.models.load import load_model, load_towers
from gemma_tune.models.placement import choose_placement
from support import seers
from support.command import copied_run, invoke, rows, write_rows
from support.ollama import ANSWER, LoopbackOllama
from support.seers import asked

GREEDY = ("--temperature", "0", "--max-new-tokens", "12", "--dtype", "fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of models that see, which have learned a little from texts."""
    found: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in found:
            place = tmp_path_factory.mktemp("seeing")
            base, run = seers.make(family, place / "seer"), place / "runs" / "seer"
            data = write_rows(place / "rows.jsonl", rows())
            for args in (("prepare", data, "--model", base), ("train", "--epochs", 2, "--dtype", "fp32", "--learning-rate", 1e-2)):
                result = invoke(*args, "--run", run)
                assert result.code == 0, result.err
            found[family] = run, base
        return found[family]

    return of


@pytest.fixture
def run(made, tmp_path) -> Path:
    """Of a Gemma 3, in runs/seer, with pictures in the directory that is worked in."""
    seers.write_pictures(tmp_path)
    once, base = made("gemma3")
    return copied_run(once, tmp_path, base)


def expected(run: Path, base: Path, turns: list[dict], adapter: bool = True, *, batch: bool = False) -> str:
    """What transformers' ``generate`` makes of the pixels, with towers and text model in one; read piece by piece, or of a batch."""
    model = load_model(base, choose_placement("fp32"), sight="towers").eval()
    chat = load_format(base, read_config(base)["model_type"])
    chat.eye.folder = Path()
    if adapter:
        model = add_adapter(model, next(run.glob("*_lora_adapter")))
    eye, names, ids = chat.eye, Prompt(turns).pictures, torch.tensor([prompt_ids(chat, turns)])
    inputs = [eye.inputs(name) for name in names]
    shown = {key: torch.cat([each[key] for each in inputs]) for key in ("pixel_values", "image_grid_thw") if inputs and key in inputs[0]}
    marks = {eye.marks: (ids == eye.soft_id).long()} if names else {}
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, top_k=None, top_p=None,
                             temperature=None, eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0], **shown, **marks)
    written = out[0, ids.shape[1]:].tolist()
    if batch:
        return answer_of(chat, written).text
    pieces = Pieces(chat)  # of bytes that are no characters it makes others than all of them together
    for token in written:
        pieces.take([token])
    pieces.end()
    return pieces.text


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5"])
def test_a_prompt_about_pictures(cli, made, family, tmp_path):
    run, base = made(family)
    seers.write_pictures(tmp_path)
    for extra, adapter in (((), True), (("--base",), False)):
        result = cli("chat", "--run", run, "--prompt", "What is it?", "--image", "0.png", "--image", "2.png", "--json", *extra, *GREEDY)
        assert result.code == 0, result.err
        answer = json.loads(result.out)
        turns = [asked("What is it?", "0.png", "2.png")]
        assert answer["answer"] == expected(run, base, turns, adapter)
        assert answer["images"] == ["0.png", "2.png"] and answer["prompt"] == "What is it?"
    assert expected(run, base, turns) != expected(run, base, turns, False), "the adapter matters"


def test_both_answer_in_a_comparison_and_a_picture_is_looked_at_once(cli, made, run, monkeypatch):
    looks = []
    monkeypatch.setattr(looking, "load_towers", lambda *a: looks.append("towers") or load_towers(*a))
    loads = []
    monkeypatch.setattr(local, "load_model", lambda *a, **k: loads.append(1) or load_model(*a, **k))
    result = cli("chat", "--compare", "--prompt", "What is it?", "--image", "1.png", "--json", *GREEDY)
    assert result.code == 0, result.err
    answer, turns = json.loads(result.out), [asked("What is it?", "1.png")]
    base = made("gemma3")[1]
    assert answer["answer"] == expected(run, base, turns) and answer["base"]["answer"] == expected(run, base, turns, False)
    assert looks == ["towers"] and loads == [1]


def test_the_merged_model_sees_with_its_own_towers(cli, made, run, monkeypatch):
    assert cli("merge").code == 0
    looked = []
    monkeypatch.setattr(looking, "load_towers", lambda folder, *a: looked.append(folder) or load_towers(folder, *a))
    result = cli("chat", "--merged", "--prompt", "What is it?", "--image", "1.png", *GREEDY)
    assert result.code == 0, result.err
    merged = next(run.glob("*_lora_merged"))
    assert result.out.strip() == expected(run, merged, [asked("What is it?", "1.png")], adapter=False).strip()
    assert [folder.name for folder in looked] == [merged.name]


def test_questions_without_pictures_load_no_towers(cli, run, monkeypatch):
    monkeypatch.setattr(looking, "load_towers", None)
    result = cli("chat", "--prompt", "Say number 3.", *GREEDY)
    assert result.code == 0 and result.out.strip(), result.err


def test_rows_name_their_pictures_from_their_file_on(cli, made, run, tmp_path, monkeypatch):
    left, close = [], Shown.close
    monkeypatch.setattr(Shown, "close", lambda shown: left.append([*Path(shown._folder.name).iterdir()]) or close(shown))
    place = tmp_path / "elsewhere"
    place.mkdir()
    (tmp_path / "0.png").rename(place / "first one.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    text = base64.b64encode((tmp_path / "1.png").read_bytes()).decode()
    questions = [{"prompt": "What is it?", "images": ["first one.png"]}, {"prompt": "Hello"},
                 {"id": 7, "prompt": "And this?", "images": ["gone.png"]}, {"prompt": "?", "images": ["../broken.png"]},
                 {"prompt": "Both?", "images": [f"data:image/png;base64,{text}", str(tmp_path / "2.png")]}, {"prompt": "?", "images": ["thin.png", "http://a.b/c.png"]},
                 {"messages": [{"role": "user", "content": "Hello"}], "images": ["first one.png"]},
                 {"messages": [{"role": "user", "content": "Is it <image>, or"}, {"role": "assistant", "content": "No."},
                               {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]}],
                  "image": "first one.png"}]
    (place / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    result = cli("chat", "--input", place / "rows.jsonl", "--json", *GREEDY)
    assert result.code == 1 and left == [[]], "what rows held went with their answers"
    found = [json.loads(line) for line in result.out.splitlines()]
    shutil.copy(place / "first one.png", "0.png")
    base = made("gemma3")[1]
    assert [one.get("answer") for one in found] == [
        expected(run, base, [asked("What is it?", "0.png")], batch=True), expected(run, base, [asked("Hello")], batch=True), None, None,
        expected(run, base, [asked("Both?", "1.png", "2.png")], batch=True), None, expected(run, base, [asked("Hello", "0.png")], batch=True),
        expected(run, base, [asked("Is it , or", "0.png", at=6), {"role": "assistant", "content": "No."}, asked("", "1.png")], batch=True)]
    assert found[0]["images"] == ["first one.png"] and found[2]["id"] == 7
    errors = [one["error"]["message"] for one in found if "error" in one]
    assert f"rows.jsonl:3: there is no picture {place / 'gone.png'}" in errors[0]
    assert "rows.jsonl:4: " in errors[1] and "broken.png is no picture that can be read: cannot identify image file" in errors[1]
    assert "rows.jsonl:6: picture 2 in `images` is at an address" in errors[2] and len(errors) == 3


@pytest.mark.parametrize(("args", "says"), [
    (["--prompt", "What?", "--image", "none.png"], "there is no picture none.png"),
    (["--prompt", "What?", "--image", "text.png"], "text.png is no picture that can be read"),
    (["--prompt", "What?", "--image", "."], ". is a directory"),
    (["--input", "rows.jsonl", "--image", "0.png"], "--image needs the question about it")])
def test_pictures_that_cannot_be_shown_are_refused_before_a_model_is_loaded(cli, run, tmp_path, monkeypatch, args, says):
    monkeypatch.setattr(local, "load_model", None)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    result = cli("chat", *args, *GREEDY)
    assert result.code == 2 and says in result.err and "Traceback" not in result.err, result.err


def test_a_picture_that_is_cut_off_is_refused(cli, run, tmp_path):
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:len(whole) // 2])
    result = cli("chat", "--prompt", "What?", "--image", "half.png", *GREEDY)
    assert result.code == 2 and "half.png is no picture that can be read" in result.err, result.err


def test_a_picture_that_the_models_processor_refuses_costs_its_own_answer_alone(cli, made, tmp_path):
    run, _ = made("qwen3.5")
    Image.new("RGB", (2, 900)).save(tmp_path / "thin.png")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "images": ["thin.png"]}\n{"prompt": "Say number 3."}\n')
    result = cli("chat", "--run", run, "--input", "rows.jsonl", "--json", *GREEDY)
    bad, good = map(json.loads, result.out.splitlines())
    assert result.code == 1 and "answer" in good, result.err
    assert f"{tmp_path / 'thin.png'} is none that the model is shown: absolute aspect ratio" in bad["error"]["message"]
    result = cli("chat", "--run", run, "--prompt", "What?", "--image", "thin.png", *GREEDY)
    assert result.code == 2 and "none that the model is shown" in result.err and "unexpected" not in result.err, result.err


def test_a_model_that_takes_text_alone_says_so(cli, fluent, tmp_path):
    seers.write_pictures(tmp_path)
    result = cli("chat", "--prompt", "What?", "--image", "0.png", *GREEDY)
    assert result.code == 2 and "no picture can be shown, because the model takes text alone" in result.err, result.err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "images": ["0.png"]}\n{"prompt": "Say number 3."}\n')
    result = cli("chat", "--input", "rows.jsonl", "--dtype", "fp32")
    assert result.code == 1 and "rows.jsonl:1: no picture can be shown" in result.err and "number is 3" in result.out


# --- through other engines --------------------------------------------------------------------------------------------


@pytest.fixture
def exported(cli, run):
    """The export in one format, without what takes long."""
    assert cli("merge", "--no-check").code == 0
    return lambda *args: cli("export-ollama", "--quant", "f16", "--no-measure", "--no-verify", "--json", *args)


def test_llama_cpp_is_shown_pictures_with_the_projector_of_the_export(cli, run, exported, monkeypatch):
    assert exported("--no-create").code == 0
    engines = []
    monkeypatch.setattr(llama, "Engine", lambda *args, **more: engines.append(more.get("projector")) or Engine(*args, **more))
    ask = ("chat", "--use", "gguf", "--json", *GREEDY)
    answers = [json.loads(cli(*ask, "--prompt", "What is it?", *image).out) for image in ((), ("--image", "0.png"), ("--image", "1.png"))]
    assert len({answer["answer"] for answer in answers}) == 3, "the picture matters"
    assert all(answer["tokens"] == 12 and not answer["ended"] for answer in answers)
    [projector] = run.glob("ollama/mmproj-*.gguf")
    assert engines[0] is None and [path and path.name for path in engines[1:3]] == [None, projector.name], "with the first picture"
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt": "What is it?", "images": ["1.png"]}, {"prompt": "What is it?"}, {"prompt": "What is it?", "images": ["0.png"]})))
    engines.clear()
    found = [json.loads(line)["answer"] for line in cli(*ask, "--input", "questions.jsonl").out.splitlines()]
    assert found == [answers[2]["answer"], answers[0]["answer"], answers[1]["answer"]] and len(engines) == 2
    result = cli(*ask, "--prompt", "word " * 2000, "--image", "0.png")
    assert result.code == 1 and "tokens, and llama.cpp has room for 1,024 here" in result.err and "fewer or smaller" in result.err
    assert exported("--no-create", "--no-vision").code == 0
    result = cli(*ask, "--prompt", "What is it?", "--image", "0.png")
    assert result.code == 2 and "the export has no file that the model sees with (mmproj)" in result.err, result.err
    assert "--use adapter" in result.err


def test_ollama_gets_pictures(cli, run, exported, monkeypatch):
    with LoopbackOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert exported("--create").code == 0
        server.requests.clear()
        Image.open("0.png").save("turned.webp", lossless=True)
        result = cli("chat", "--use", "ollama", "--prompt", "What is it?", "--image", "turned.webp", "--image", "1.png", "--json")
        assert result.code == 0 and json.loads(result.out)["answer"] == ANSWER, result.err
        [turn] = server.requests[-1].body["messages"]
        assert turn["content"] == "What is it?" and turn.keys() == {"role", "content", "images"}
        sent = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in turn["images"]]
        assert [picture.format for picture in sent] == ["PNG", "PNG"]
        assert [picture.tobytes() for picture in sent] == [Image.open(name).convert("RGB").tobytes() for name in ("0.png", "1.png")]
        assert exported("--create", "--no-vision").code == 0
        result = cli("chat", "--use", "ollama", "--prompt", "What is it?", "--image", "0.png")
        assert result.code == 2 and "takes text alone" in result.err and "Traceback" not in result.err, result.err
