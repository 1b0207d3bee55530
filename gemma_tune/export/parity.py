"""Whether the exported model is asked and answers as the trained one: token ids of whole prompts, and greedy answers.

A prompt's ids come from Hugging Face's rendering and tokenizer. They are compared with those that llama.cpp makes of
the same messages with the template and the vocabulary in the GGUF, and with those of Ollama: its TEMPLATE rendered by
Go, the text tokenised in the GGUF, whose tokenizer adds the BOS. What cannot be checked here says so, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.export.parity_cases import built_in, limit
from gemma_tune.export.parity_report import (
    COLUMNS,
    DIFFERS,
    EQUAL,
    KNOWN,
    LLAMA_CPP,
    OLLAMA,
    UNCHECKED,
    Agreement,
    Case,
    Check,
    Parity,
)
from gemma_tune.gguf.engine import Engine, EngineRefused, engine_name
from gemma_tune.ollama import go_template
from gemma_tune.ollama.go_template import TemplateFailed
from gemma_tune.ollama.template import OllamaChat

HELD_OUT = 8  # chats of a run to compare
LONGEST_PROMPT = 2048  # tokens of such a chat
ANSWER_TOKENS = 32  # of each answer
_END = -1  # stands for the token that ends an answer, which has several names


def verify(chat: ChatFormat, ollama_chat: OllamaChat, ggufs: Mapping[str, Path], conversations: Sequence[Prompt], *,
           merged_model: Any = None, answers: int = 4, answer_tokens: int = ANSWER_TOKENS,
           listener: Listener | None = None) -> Parity:
    """Compare prompts and answers of exported files with Hugging Face's.

    Args:
        chat: tokenizer and template of the merged model.
        ollama_chat: what the Modelfile says.
        ggufs: the files, each with a short label such as ``q8_0``.
        conversations: held-out prompts, of which the chats count; built-in chats are added.
        merged_model: the merged model in transformers; None leaves answers out.
        answers: how many of the prompts are answered; the held-out ones come first.
        answer_tokens: longest answer.

    Raises:
        UserError: llama.cpp is not installed.
        WorkFailed: it cannot load a file.
    """
    listener = listener or Listener()
    chats = [prompt for prompt in conversations if prompt.text is None]
    prompts = {f"held-out chat {n}": prompt for n, prompt in enumerate(chats, start=1)} | built_in()
    expected, refused = _expected(chat, prompts)
    texts = _ollama_texts(ollama_chat, {name: prompts[name] for name in expected})
    asked = list(expected.values())[:answers] if merged_model is not None else []
    theirs = _transformers_answers(merged_model, chat, asked, answer_tokens, listener)
    found: dict[str, dict[str, dict[str, Check]]] = {}
    greedy = {}
    for n, (label, gguf) in enumerate(ggufs.items(), start=1):
        with Engine(gguf, max(map(len, asked), default=1) + answer_tokens) as engine:
            found[label] = {name: _checks(engine, chat, prompts[name], ids, texts[name])
                            for name, ids in expected.items()}
            if asked:
                greedy[label] = _agreement(theirs, [_engine_answer(engine, ids, answer_tokens) for ids in asked])
        listener.progress("comparing with llama.cpp", n, len(ggufs))
    cases = [Case(name, 0, dict.fromkeys(COLUMNS, refused[name])) if name in refused else
             _case(name, len(expected[name]), {label: checks[name] for label, checks in found.items()}, ggufs.values())
             for name in prompts]
    return Parity(engine_name(), cases, greedy, "" if asked else "the merged model is not loaded")


def _expected(chat: ChatFormat, prompts: Mapping[str, Prompt]) -> tuple[dict[str, list[int]], dict[str, Check]]:
    """Hugging Face's ids of each prompt; and of those that its template refuses, what it says."""
    expected: dict[str, list[int]] = {}
    refused: dict[str, Check] = {}
    for name, prompt in prompts.items():
        try:
            expected[name] = prompt.ids(chat)
        except FormatError as e:
            refused[name] = Check(UNCHECKED, f"not for this template: {e}")
    return expected, refused


def _ollama_texts(ollama_chat: OllamaChat, prompts: Mapping[str, Prompt]) -> dict[str, str | Check]:
    """What Ollama makes of each prompt, or the check where that is clear without its text."""
    if ollama_chat.template is None:
        return dict.fromkeys(prompts, Check(UNCHECKED, f"Ollama's built-in renderer {ollama_chat.renderer} does it"))
    texts: dict[str, str | Check] = {
        name: Check(UNCHECKED, "it has tools, which Ollama hands to a TEMPLATE in a form of its own")
        for name, prompt in prompts.items() if prompt.tools or any(m["role"] == "tool" for m in prompt.messages)}
    left = [name for name in prompts if name not in texts]
    try:
        rendered: Sequence[str | Check] = go_template.render(
            ollama_chat.template, [prompts[name].messages for name in left], ollama_chat.default_system)
    except TemplateFailed as e:
        rendered = [Check(DIFFERS, e.message)] * len(left)
    except UserError as e:
        rendered = [Check(UNCHECKED, f"{e.message} ({e.hint})")] * len(left)
    return texts | dict(zip(left, rendered, strict=True))


def _checks(engine: Engine, chat: ChatFormat, prompt: Prompt, expected: Sequence[int],
            ollama_text: str | Check) -> dict[str, Check]:
    """One prompt in each column, in one GGUF."""
    try:
        text = engine.apply_template(prompt.messages, prompt.tools)
        in_llama_cpp = _compared(engine, chat, expected, text, LLAMA_CPP)
    except EngineRefused as e:
        in_llama_cpp = Check(DIFFERS, e.message)
    return {LLAMA_CPP: in_llama_cpp, OLLAMA: ollama_text if isinstance(ollama_text, Check) else
            _compared(engine, chat, expected, ollama_text, OLLAMA)}


def _compared(engine: Engine, chat: ChatFormat, expected: Sequence[int], text: str, column: str) -> Check:
    """A rendered prompt as a server tokenises it: with BOS where the GGUF asks for it, special tokens recognised."""
    ids = engine.tokenize(text, add_special=True, parse_special=True)
    if ids == expected:
        return Check(EQUAL)
    n = leading(expected, ids)
    return Check(DIFFERS, f"token {n + 1} is {_token(chat, expected, n)} in Hugging Face, {_token(chat, ids, n)} in "
                          f"{column}")


def _token(chat: ChatFormat, ids: Sequence[int], n: int) -> str:
    if n == len(ids):
        return "missing"
    token = chat.tokenizer.convert_ids_to_tokens(ids[n]) if ids[n] < len(chat.tokenizer) else None
    return f"id {ids[n]}" if token is None else repr(token)


def _case(name: str, tokens: int, by_file: Mapping[str, Mapping[str, Check]], ggufs: Iterable[Path]) -> Case:
    checks = {column: _together({label: checks[column] for label, checks in by_file.items()}) for column in COLUMNS}
    differs = any(check.state == DIFFERS for check in checks.values())
    limited, reason = limit(name, ggufs) if differs else ((), "")
    return Case(name, tokens, {column: Check(KNOWN, f"{reason} ({check.detail})")
                               if check.state == DIFFERS and column in limited else check
                               for column, check in checks.items()})


def _together(checks: Mapping[str, Check]) -> Check:
    """One check for all files, which share a tokenizer; those that differ where others do not are named."""
    if len(set(checks.values())) == 1:
        return next(iter(checks.values()))
    return Check(DIFFERS, "; ".join(f"{label}: {c.detail}" for label, c in checks.items() if c.state == DIFFERS))


def leading(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many ids at the start are equal."""
    return next((n for n, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))


def _transformers_answers(model: Any, chat: ChatFormat, prompts: Sequence[Sequence[int]], count: int,
                          listener: Listener) -> list[list[int]]:
    """Greedy answers, one by one: in a batch, padding moves the last digits of the numbers."""
    import torch

    from gemma_tune.answers.generation import sampling_arguments

    answers = []
    for n, prompt in enumerate(prompts, start=1):
        ids = torch.tensor([list(prompt)], device=model.device)
        arguments = sampling_arguments(model, {"temperature": 0.0, "repetition_penalty": 1.0})
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                 eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0], **arguments)
        new = out[0, len(prompt):].tolist()
        answers.append([*new[:-1], _END] if new[-1] in chat.stop_ids else new)
        listener.progress("answering with transformers", n, len(prompts))
    return answers


def _engine_answer(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    answer = engine.complete(prompt, count)
    return [*answer.ids, _END] if answer.ended else list(answer.ids)


def _agreement(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> Agreement:
    return Agreement(answers=len(theirs), whole=sum(a == b for a, b in zip(theirs, ours)),
                     tokens=sum(map(len, theirs)), leading=sum(map(leading, theirs, ours)))
