"""Asking a model in Ollama, against the loopback server: what counts as an answer, and which version will do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma_tune.base.errors import WorkFailed
from gemma_tune.ollama.client import Server, capabilities, check_version, create_model, generate_check, rendered_prompt
from gemma_tune.ollama.template import OllamaChat
from support.ollama import ANSWER, THOUGHT, LoopbackOllama

GEMMA = OllamaChat("{{ range .Messages }}{{ .Content }}{{ end }}", ("<end_of_turn>",), family="gemma")
THINKING = OllamaChat(None, ("<turn|>",), renderer="gemma4-small", parser="gemma4", family="gemma4", think=True)
QUIET = OllamaChat(None, ("<turn|>",), renderer="gemma4-small", parser="gemma4-no-thinking", family="gemma4", think=False)
QWEN = OllamaChat("{{ .Prompt }}", ("<|im_end|>",), family="chatml", think=False)
ASK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "gemma-q8_0.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    return path


def made(server: LoopbackOllama, gguf: Path, chat: OllamaChat = GEMMA, **more: str) -> Server:
    """The server with a model named m."""
    found = Server(server.url, server.version)
    create_model(found, "m", gguf, chat, {}, **more)
    return found


@pytest.mark.parametrize("generation", ["0.33", "0.34.1"])
def test_one_answer_that_is_the_same_each_time(generation, gguf):
    with LoopbackOllama(generation) as server:
        ollama = made(server, gguf, system="Be kind.")
        assert generate_check(ollama, "m", ASK, timeout=5, chat=GEMMA) == {
            "answer": ANSWER, "done_reason": "stop", "prompt_eval_count": 4, "eval_count": 6,
            "seconds": 1.5, "load_seconds": 0.25,
        }  # fmt: skip
        assert server.requests[-1].body == {
            "model": "m", "messages": ASK, "stream": False, "options": {"temperature": 0, "seed": 0, "num_predict": 256},
        }  # fmt: skip


def test_an_answer_that_does_not_end_is_cut_and_told(gguf):
    with LoopbackOllama(faults={"chat-endless"}) as server:
        check = generate_check(made(server, gguf), "m", ASK, 5, 12, chat=GEMMA)
    assert (check["done_reason"], check["eval_count"]) == ("length", 12)


@pytest.mark.parametrize(
    ("fault", "chat", "why", "hint"),
    [
        ("chat-error", GEMMA, "exit status 2", "log"),
        ("chat-error-inside", GEMMA, "could not answer with m: an error was encountered", "log"),
        ("chat-slow", GEMMA, "did not answer in time", "run the same command again"),
        ("chat-empty", GEMMA, "m answered nothing in Ollama", "gemma-tune chat"),
        ("chat-empty", THINKING, "m only thought, and answered nothing", "gemma-tune chat"),
        ("chat-marker", GEMMA, "its answer has '<end_of_turn>' in it", "ollama show m --parameters"),
        ("chat-marker", QWEN, "its answer has '<|im_end|>' in it", "ollama show m --parameters"),
        ("chat-new-turn", GEMMA, "its answer has '<start_of_turn>' in it", "ollama show m --parameters"),
    ],
)
def test_what_is_no_answer(fault, chat, why, hint, gguf):
    with LoopbackOllama(faults={fault}) as server:
        ollama = made(server, gguf, chat)
        with pytest.raises(WorkFailed, match=re.escape(why)) as raised:
            generate_check(ollama, "m", ASK, timeout=0.3 if fault == "chat-slow" else 5, chat=chat)
    assert raised.value.exit_code == 1 and hint in raised.value.hint


def test_a_model_that_is_not_there():
    with LoopbackOllama() as server, pytest.raises(WorkFailed, match="answer with m: model 'm' not found") as raised:
        generate_check(Server(server.url, server.version), "m", ASK, timeout=5)
    assert "ollama list" in raised.value.hint


@pytest.mark.parametrize(
    ("chat", "thinks", "sent"),
    [
        (THINKING, False, True),  # as trained, and as the server would do by itself
        (QUIET, False, None),  # the parser does not think, so nothing has to be said
        (QWEN, True, False),  # the server reads thinking off the template in the GGUF
        (QWEN, False, None),  # an older one does not
        (GEMMA, True, None),  # a template without a switch
    ],
)
def test_it_is_asked_to_think_as_in_training(chat, thinks, sent, gguf):
    with LoopbackOllama(thinks=thinks) as server:
        ollama = made(server, gguf, chat)
        assert ("thinking" in capabilities(ollama, "m")) == (chat is THINKING or thinks)
        assert generate_check(ollama, "m", ASK, timeout=5, chat=chat)["answer"] == ANSWER
        assert server.requests[-1].body.get("think") is sent


def test_reasoning_in_a_conversation_has_ollamas_name(gguf):
    talk = [*ASK, {"role": "assistant", "content": "I.", "reasoning_content": THOUGHT}, *ASK]
    with LoopbackOllama() as server:
        generate_check(made(server, gguf), "m", talk, timeout=5)
        assert server.requests[-1].body["messages"][1] == {"role": "assistant", "content": "I.", "thinking": THOUGHT}


def test_the_prompt_that_the_server_makes(gguf):
    with LoopbackOllama(thinks=True) as server:
        ollama = made(server, gguf, QWEN, system="S")
        assert rendered_prompt(ollama, "m", ASK, chat=QWEN) == "[system]S[user]Who are you?"
        assert (server.requests[-1].body["_debug_render_only"], server.requests[-1].body["think"]) == (True, False)


def test_a_server_that_does_not_show_its_prompts(gguf):
    with LoopbackOllama("0.33", faults={"no-render"}) as server:
        assert rendered_prompt(made(server, gguf), "m", ASK) is None
        assert server.requests[-1].body["options"]["num_predict"] == 1


@pytest.mark.parametrize(
    ("version", "model_type", "needed"),
    [
        ("0.5.13", "gemma3_text", "0.6.0"),
        ("v0.19.0", "gemma4", "0.20.0"),
        ("0.6.5", "qwen3", "0.6.6"),
        ("0.6.5", "qwen3_moe", "0.6.6"),
        ("0.19.0", "gemma4_unified", "0.20.0"),
        ("0.17.4", "qwen3_5_text", "0.17.5"),
        ("0.20.7", "qwen3_5_moe", "0.30.0"),
        ("0.17.5", "qwen3_5", None),
        ("0.30.0-rc20", "qwen3_5_moe_text", None),
        ("0.5.4", "llama", "0.5.5"),
        ("0.6.0", "gemma3", None),
        ("0.20.0-rc1", "gemma4", None),
        ("0.34.1", "gemma4", None),
        ("1.0.0", "gemma4", None),
        ("0.0.0", "gemma4", None),
        ("main-3f2a", "gemma4", None),
        ("", "gemma3", None),
    ],
)
def test_a_server_that_is_too_old(version, model_type, needed):
    server = Server("http://127.0.0.1:1", version)
    if needed is None:
        return check_version(server, model_type)
    with pytest.raises(WorkFailed, match=f"Ollama {version} at .* takes {needed} or later") as raised:
        check_version(server, model_type)
    assert "Update Ollama" in raised.value.hint
