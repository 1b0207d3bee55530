"""How Ollama servers of several versions read prompts, against training's: the double counts with real llama.cpp."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.export import served
from gemma_tune.export.parity import prompts_of
from gemma_tune.export.parity_cases import LIMITS
from gemma_tune.export.parity_report import Case, Check, Parity, Served, replaced
from gemma_tune.export.target import Target
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.ollama.client import Server, create_model
from gemma_tune.ollama.template import chat_for
from support.llamas import make_stripping_phi
from support.ollama import LoopbackOllama, by_template

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}]


@dataclass
class Model:
    gguf: Path
    chat: ChatFormat
    target: Target


@pytest.fixture(scope="session")
def model(tiny, tmp_path_factory) -> Model:
    chat, gguf = load_format(tiny, "gemma3_text"), tmp_path_factory.mktemp("served") / "m.gguf"
    write_gguf(tiny, gguf, "f16", name="m", chat_template=chat.template, eot_token_id=chat.terminator_id)
    return Model(gguf, chat, Target("m", chat_for(chat.template), {"num_ctx": 1024, "temperature": 0.0}, None, None))


@contextmanager
def running(model: Model, generation: str = "0.33", faults=(), render=by_template, target: Target | None = None):
    """The model on a double, and how the double reads prompts: all those of the report, or some."""
    target = target or model.target
    with LoopbackOllama(generation, faults, render=render) as double:
        server = Server(double.url, double.version)
        create_model(server, "m", model.gguf, target.chat, target.parameters, target.system)

        def asked(prompts=None, listener=None, **more):
            who, cases = served.ask_server(server, target, model.chat, prompts or prompts_of(model.chat, []), listener or Listener(),
                                           **more)
            return who, {case.name: case.checks["Ollama"] for case in cases}

        yield double, asked


def talk(*texts: str, **more) -> Prompt:
    return Prompt([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)], **more)


@pytest.mark.parametrize("generation", ["0.33", "0.34.1"])
def test_a_server_that_reads_prompts_as_training_did(model, go_cache, generation):
    """Also where it is asked again, so that all prompts are cached."""
    done = []
    listener = Listener()
    listener.progress = lambda task, n, total: done.append((n, total))
    with running(model, generation) as (double, asked):
        for _ in range(2):
            who, checks = asked(listener=listener)
            assert (who.version, who.shows, who.untold) == (double.version, True, "")
            assert {check for name, check in checks.items() if name not in LIMITS} == {Check("equal")}
            assert {checks[name].state for name in LIMITS} <= {"equal", "known limit"}
        last = double.requests[-1].body
        assert last["truncate"] is False and last["options"] == {"temperature": 0, "seed": 0, "num_predict": 1}
    assert done[14] == (15, 15) and len(done) == 30


def test_a_tokenizer_of_the_servers_own_is_noticed(model, go_cache):
    """As before 0.30, where a paragraph break becomes two tokens: the text is the same, the number of tokens not."""
    with running(model, "0.24", ["own-tokenizer"]) as (_, asked):
        _, checks = asked()
    assert checks["no system"] == Check("equal")
    tokens = len(model.chat.prompt_ids(prompts_of(model.chat, [])["system"].messages))
    assert checks["system"] == Check("differs", f"{tokens + 1} tokens instead of {tokens}: the server seems to have a "
                                                "tokenizer of its own")
    assert {"differs", "equal"} == {check.state for name, check in checks.items() if name not in LIMITS}


def test_counts_without_cached_tokens_are_no_counts(model, go_cache):
    """0.30.0 counts what it had not cached, which is never the whole prompt: its counts would differ at random."""
    with running(model, "0.30") as (_, asked):
        who, checks = asked()
        assert who.untold == "this server counts only tokens that it had not cached" and who.shows
        assert {check for name, check in checks.items() if name not in LIMITS} == {Check("equal", "text alone")}


def test_a_server_that_shows_no_prompts_is_compared_by_counts(model, go_cache):
    for fault, state in (([], {"equal"}), (["own-tokenizer"], {"equal", "differs"})):
        with running(model, "0.24", ["no-render", *fault]) as (_, asked):
            who, checks = asked()
        assert who.untold == "this server does not show its prompts" and not who.shows
        assert {check.state for name, check in checks.items() if name not in LIMITS} == state
        assert checks["no system"] == Check("equal", "number of tokens alone")
    for faults in (["no-render", "no-count"], ["no-count"]):
        with running(model, faults=faults) as (_, asked):
            who, checks = asked({"one": talk("Hi")})
        assert who.untold.endswith("counts only tokens that it had not cached")
        assert checks["one"].state == ("not checked" if "no-render" in faults else "equal")


def test_the_first_difference_of_a_text_is_shown(model, go_cache):
    def newline_more(system, messages):
        return by_template(system, messages, model.target.chat.template) + "\n"

    with running(model, render=newline_more) as (double, asked):
        _, checks = asked()
        # What is laid out otherwise is not read as well.
        assert all("_debug_render_only" in r.body for r in double.requests if r.path == "/api/chat")
    text = model.chat.render(talk("Hi").messages, prompt=True).removeprefix("<bos>")
    assert checks["no system"] == Check("differs", f"from character {len(text) + 1} on '\\n' instead of ''")
    of_tokenizers = [name for name, (columns, _) in LIMITS.items() if "Ollama" in columns]
    assert {checks[name].state for name in of_tokenizers} == {"differs"}


def test_a_template_engine_that_trims_ascii_only_is_a_known_limit(model, go_cache):
    """Newer servers may let llama.cpp render the template in the GGUF."""
    def ascii_trims(system, messages):
        wide = [turn | {"content": turn["content"].replace("\u3000", "~").replace("\u00a0", "~")} for turn in messages]
        return by_template(system, wide, model.target.chat.template).replace("~", "\u3000")

    with running(model, render=ascii_trims) as (_, asked):
        _, checks = asked()
    assert checks["padded wide spaces"].state == "known limit"
    assert "trims ASCII white space only (from character" in checks["padded wide spaces"].detail


def test_special_tokens_that_take_white_space_with_them_are_a_known_limit(tmp_path, go_cache):
    """Phi-4's: the server counts what llama.cpp keeps; also of a SYSTEM that the prompts themselves do not hold."""
    make_stripping_phi(tmp_path / "phi")
    chat, gguf = load_format(tmp_path / "phi", "phi3"), tmp_path / "m.gguf"
    write_gguf(tmp_path / "phi", gguf, "f16", name="m", chat_template=chat.template, eot_token_id=chat.terminator_id)
    phi = Model(gguf, chat, Target("m", chat_for(chat.template), {"num_ctx": 512}, None, None))
    with running(phi) as (_, asked):
        _, checks = asked()
    assert {name for name, check in checks.items() if "which llama.cpp keeps (" in check.detail} == {
        "padded white space", "padded system", "code", "padded wide spaces"}
    assert "differs" not in {check.state for check in checks.values()}
    with running(phi, target=replace(phi.target, system="Be brief. \n")) as (_, asked):
        _, checks = asked({"plain": talk("Hi")})
    assert checks["plain"].state == "known limit"


def test_it_is_asked_to_think_or_not_as_in_training(model, go_cache):
    """Whether the server has to be told is found out once."""
    target = replace(model.target, chat=replace(model.target.chat, think=False))
    with running(model, target=target) as (double, asked):
        for double.thinks, said in ((True, {False}), (False, {None})):
            double.requests.clear()
            _, checks = asked({"one": talk("Hi"), "two": talk("Ho")})
            assert set(checks.values()) == {Check("equal")}
            assert {r.body.get("think") for r in double.requests if r.path == "/api/chat"} == said
            assert double.paths().count("POST /api/show") == 1


def test_system_of_the_model_is_part_of_what_is_expected(model, go_cache):
    target = replace(model.target, system="Be brief.\r\n\r\nAnswer in 中文.")
    with running(model, target=target) as (_, asked):
        _, checks = asked({"without": talk("Hi"), "with": prompts_of(model.chat, [])["system"]})
        assert set(checks.values()) == {Check("equal")}
    chat = replace(model.target.chat, default_system="Be kind.")
    with running(model, target=replace(target, system="", chat=chat)) as (double, asked):
        _, checks = asked({"without": talk("Hi")})
    assert checks["without"].state == "not checked" and "SYSTEM was to be empty" in checks["without"].detail


def test_what_the_template_of_training_refuses_is_not_asked(model):
    with running(model) as (double, asked):
        _, checks = asked({"refused": Prompt(talk("a").messages * 2)})
    assert checks["refused"].state == "not checked" and "not for this template" in checks["refused"].detail
    assert "POST /api/chat" not in double.paths()


def test_tools(model, go_cache):
    """What the export has told of is no second error; where the TEMPLATE has a place for them, they have to fit."""
    calls = [{"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
    turns = [*talk("And in Köln?").messages, {"role": "assistant", "content": "", "tool_calls": calls},
             {"role": "tool", "name": "weather", "tool_call_id": "1", "content": "rain"}]
    on_offer = talk("Hi", tools=TOOLS)
    with running(model) as (double, asked):
        _, checks = asked({"tools": on_offer})
    assert checks["tools"].state == "known limit" and "m does not support tools" in checks["tools"].detail
    assert double.requests[-1].body["tools"] == TOOLS

    taking = replace(model.target.chat, template=model.target.chat.template + "{{ if .Tools }}{{ end }}")
    with running(model, target=replace(model.target, chat=taking), render=lambda system, messages: "?") as (double, asked):
        _, checks = asked({"tools": on_offer})
        assert checks["tools"].state == "differs"
        served.ollama.rendered_prompt(Server(double.url, "0.33.0"), "m", turns)
    assert double.requests[-1].body["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": calls[0]["function"]}]},
        {"role": "tool", "content": "rain", "tool_name": "weather", "tool_call_id": "1"}]


def test_what_is_no_matter_of_one_prompt_is_an_error(model):
    with running(model, faults=["chat-error"]) as (_, asked), pytest.raises(WorkFailed, match="process has terminated"):
        asked()


def test_a_slow_server_is_not_waited_for_without_end(model, go_cache, monkeypatch):
    monkeypatch.setattr(served, "MOST_SECONDS", -1.0)
    with running(model) as (_, asked):
        _, checks = asked()
    assert [check.state for check in checks.values()] == ["equal"] + ["not checked"] * 14


def test_a_context_that_is_too_short_for_the_prompts_is_asked_to_be_longer(model, go_cache):
    with running(model, target=replace(model.target, parameters={"num_ctx": 16})) as (double, asked):
        asked({"long": talk("one two three four five six seven")})
        sent = [r.body["options"].get("num_ctx") for r in double.requests if r.path == "/api/chat"]
    tokens = len(model.chat.prompt_ids(talk("one two three four five six seven").messages))
    assert set(sent) == {tokens + 1}


# --- in the report


COLUMNS = {"llama.cpp": Check("known limit", "why"), "Ollama": Check("template only")}
BEFORE = Parity("llama.cpp 1", [Case("code", 12, COLUMNS), Case("emoji", 3, COLUMNS)], {}, "no model")
ASKED = [Case("emoji", 3, {"Ollama": Check("differs", "4 tokens instead of 3")}), Case("new", 5, {"Ollama": Check("equal")})]


def test_the_column_becomes_the_servers():
    after = BEFORE.with_server(Served("0.24.0", "m", True), ASKED)
    assert BEFORE.ok and not after.ok
    assert after.rows() == [
        ("prompt", "tokens", "llama.cpp", "Ollama 0.24.0"),
        ("code", "12", "known limit: why", "not checked: the server was not asked"),
        ("emoji", "3", "known limit: why", "differs: 4 tokens instead of 3"),
        ("new", "5", "not checked: not among the prompts then", "equal")]
    assert after.as_json()["served"] == {"version": "0.24.0", "model": "m", "shows": True, "untold": ""}
    alone = Parity("", (), {}, "no engine", ()).with_server(Served("0.30.0", "m", True, "this server counts nothing"), ASKED)
    assert alone.rows()[0] == ("prompt", "tokens", "Ollama 0.30.0") and "But this server counts nothing." in alone.markdown()


def test_ids_that_llama_cpp_makes_otherwise_are_not_equal_for_being_as_many():
    """A server that was asked before says nothing of that: only what llama.cpp made of the text does."""
    other = Check("known limit", "llama.cpp divides spaces otherwise")
    before = Parity("llama.cpp 1", [Case("spaces", 9, {**COLUMNS, "Ollama": other})], {}, "no model")
    one = before.with_server(Served("0.24.0", "m", True), [Case("spaces", 9, {"Ollama": Check("differs", "10 tokens")})])
    assert one.cases[0].checks["Ollama"] == Check("differs", "10 tokens")
    two = Parity.from_json(one.as_json()).with_server(Served("0.33.0", "m", True), [Case("spaces", 9, {"Ollama": Check("equal")})])
    assert two.cases[0].checks["Ollama"] == Check("known limit", "llama.cpp divides spaces otherwise; as many tokens")
    plain = BEFORE.with_server(Served("0.24.0", "m", True), ASKED)
    assert plain.with_server(Served("0.33.0", "m", True), [Case("emoji", 3, {"Ollama": Check("equal")})]).cases[1].checks[
        "Ollama"] == Check("equal")


def test_what_the_manifest_has_is_the_report_again():
    for parity in (BEFORE, BEFORE.with_server(Served("0.24.0", "m", False, "x"), ASKED)):
        assert Parity.from_json(parity.as_json()) == replace(parity, cases=list(parity.cases))
    for damaged in (None, [], {"ids": {}}, {**BEFORE.as_json(), "prompts": [{"name": 1}]}, {**BEFORE.as_json(), "served": 3}):
        assert Parity.from_json(damaged) is None


def test_the_section_of_the_report_is_replaced():
    after = BEFORE.with_server(Served("0.24.0", "m", True), ASKED)
    for before, behind in (("# m\n\n", "\n## Not checked\n\n- x\n"), ("", ""), ("# m\n\n| a |\n\n", "")):
        assert replaced(f"{before}{BEFORE.markdown()}{behind}", after) == f"{before}{after.markdown()}{behind}"
    assert replaced("# m\n", after) == f"# m\n\n{after.markdown()}"
