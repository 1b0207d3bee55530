"""Whether the exported model is asked and answers as the trained one: token ids of whole prompts, and greedy answers.

A prompt's ids come from Hugging Face's rendering and tokenizer. They are compared with those that llama.cpp makes of
the same messages with the template and the vocabulary in the GGUF, and with those of Ollama as far as they can be told
without a server (``export.served`` asks one): its TEMPLATE rendered by Go, the text tokenised in the GGUF, whose
tokenizer adds the BOS. What cannot be checked here says so, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.answers.prompts import Prompt
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.left_out import kinds_in
from gemma_tune.export.parity_cases import Limit, built_in, limit_of
from gemma_tune.export.parity_report import (
    COLUMNS,
    DIFFERS,
    EQUAL,
    KNOWN,
    LLAMA_CPP,
    OLLAMA,
    TEMPLATE,
    UNCHECKED,
    Agreement,
    Case,
    Check,
    Parity,
)
from gemma_tune.gguf.engine import Engine, EngineRefused
from gemma_tune.gguf.llama_cpp import engine_name
from gemma_tune.ollama import go_template
from gemma_tune.ollama.go_template import TemplateFailed
from gemma_tune.ollama.kept import NOTE as KEPT_NOTE
from gemma_tune.ollama.kept import is_known
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
    prompts = prompts_of(chat, conversations)
    expected, refused = _expected(chat, prompts)
    texts = _ollama_texts(chat, ollama_chat, {name: prompts[name] for name in expected})
    asked = list(expected.values())[:answers] if merged_model is not None else []
    found: dict[str, dict[str, dict[str, Check]]] = {}
    answers_of: dict[str, list[list[int]]] = {}
    for n, (label, gguf) in enumerate(ggufs.items(), start=1):
        with Engine(gguf, max(map(len, asked), default=1) + answer_tokens) as engine:
            found[label] = {name: _checks(engine, chat, prompts[name], ids, texts[name])
                            for name, ids in expected.items()}
            if asked:
                answers_of[label] = [_engine_answer(engine, ids, answer_tokens) for ids in asked]
        listener.progress("comparing with llama.cpp", n, len(ggufs))
    greedy = {label: _agreement(merged_model, chat, asked, given) for label, given in answers_of.items()}
    cases = [Case(name, 0, dict.fromkeys(COLUMNS, refused[name])) if name in refused else
             _case(name, len(expected[name]), {label: checks[name] for label, checks in found.items()},
                   partial(limit_of, name, prompts[name].messages, chat, ggufs.values()))
             for name in prompts]
    return Parity(engine_name(), cases, greedy, "" if asked else "the merged model is not loaded")


def prompts_of(chat: ChatFormat, conversations: Sequence[Prompt]) -> dict[str, Prompt]:
    """The prompts of the report by name: the chats among ``conversations``, and the built-in ones."""
    chats = [replace(prompt, messages=chat.with_thoughts_apart(prompt.messages))
             for prompt in conversations if prompt.text is None]
    return {f"held-out chat {n}": prompt for n, prompt in enumerate(chats, start=1)} | built_in()


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


def _ollama_texts(chat: ChatFormat, ollama_chat: OllamaChat,
                  prompts: Mapping[str, Prompt]) -> dict[str, str | Check]:
    """What Ollama makes of each prompt, or the check where that is clear without its text."""
    if ollama_chat.template is None:
        return dict.fromkeys(prompts, Check(UNCHECKED, f"Ollama's built-in renderer {ollama_chat.renderer} does it"))
    called = {name: prompt for name, prompt in prompts.items() if kinds_in(prompt.messages, prompt.tools)}
    plain = {name: prompt for name, prompt in prompts.items() if name not in called}
    texts = dict(zip(plain, _rendered(ollama_chat, list(plain.values())), strict=True))
    for name, prompt in called.items():  # each by itself: tools that do not fit Ollama's structures fail alone
        if ollama_chat.takes_tools:
            texts[name] = _with_tools(chat, prompt, *_rendered(ollama_chat, [prompt]))
        else:
            texts[name] = Check(UNCHECKED, "it has tools, for which the TEMPLATE has no place")
    return texts


def _rendered(ollama_chat: OllamaChat, prompts: Sequence[Prompt]) -> Sequence[str | Check]:
    try:
        return go_template.render(ollama_chat.template, [prompt.messages for prompt in prompts],
                                  ollama_chat.default_system, tools=[prompt.tools for prompt in prompts])
    except TemplateFailed as e:
        return [Check(DIFFERS, e.message)] * len(prompts)
    except UserError as e:
        return [Check(UNCHECKED, f"{e.message} ({e.hint})")] * len(prompts)


def _with_tools(chat: ChatFormat, prompt: Prompt, text: str | Check) -> str | Check:
    """The text, or a known limit where it is that of training but for what Ollama changes in tools and calls."""
    if isinstance(text, Check):
        return Check(KNOWN, f"Ollama refuses such tools ({text.detail})") if "cannot unmarshal" in text.detail else text

    return Check(KNOWN, KEPT_NOTE) if is_known(text, prompt.messages, prompt.tools, chat.prompt_text) else text


def _checks(engine: Engine, chat: ChatFormat, prompt: Prompt, expected: Sequence[int],
            ollama_text: str | Check) -> dict[str, Check]:
    """One prompt in each column, in one GGUF."""
    try:
        text = engine.apply_template(prompt.messages, prompt.tools)
        in_llama_cpp = _compared(engine, chat, expected, text, LLAMA_CPP)
    except EngineRefused as e:
        in_llama_cpp = Check(DIFFERS, e.message)
    if isinstance(ollama_text, Check):
        return {LLAMA_CPP: in_llama_cpp, OLLAMA: ollama_text}
    of_template = _compared(engine, chat, expected, ollama_text, OLLAMA)
    return {LLAMA_CPP: in_llama_cpp, OLLAMA: Check(TEMPLATE) if of_template.state == EQUAL else of_template}


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


def _case(name: str, tokens: int, by_file: Mapping[str, Mapping[str, Check]],
          limit_of_it: Callable[[], Limit | None]) -> Case:
    checks = {column: _together({label: checks[column] for label, checks in by_file.items()}) for column in COLUMNS}
    differing = [column for column, check in checks.items() if check.state == DIFFERS]
    limit = limit_of_it() if differing else None  # which can take a look at the files
    known = {column: Check(KNOWN, f"{limit.reason} ({checks[column].detail})") for column in differing
             if limit and column in limit.columns}
    return Case(name, tokens, checks | known)


def _together(checks: Mapping[str, Check]) -> Check:
    """One check for all files, which share a tokenizer; those that differ where others do not are named."""
    if len(set(checks.values())) == 1:
        return next(iter(checks.values()))
    return Check(DIFFERS, "; ".join(f"{label}: {c.detail}" for label, c in checks.items() if c.state == DIFFERS))


def leading(expected: Sequence[int], got: Sequence[int]) -> int:
    """How many ids at the start are equal."""
    return next((n for n, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))


def _engine_answer(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    answer = engine.complete(prompt, count)
    return [*answer.ids, _END] if answer.ended else list(answer.ids)


def _agreement(model: Any, chat: ChatFormat, prompts: Sequence[Sequence[int]],
               answers: Sequence[Sequence[int]]) -> Agreement:
    """How far transformers would have given the same greedy answers.

    It does so up to the first token that is not its likeliest behind those before it, so one pass over prompt and
    answer tells, where generating takes one for each token.
    """
    same = [_likeliest(model, chat, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return Agreement(answers=len(answers), whole=sum(map(all, same)), tokens=sum(map(len, answers)),
                     leading=sum(next((n for n, as_theirs in enumerate(row) if not as_theirs), len(row))
                                 for row in same))


def _likeliest(model: Any, chat: ChatFormat, prompt: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """For each token of an answer whether it is the model's likeliest there."""
    import torch

    if not answer:
        return []
    ids = torch.tensor([[*prompt, *(id for id in answer if id != _END)]], device=model.device)
    with torch.inference_mode():
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        # What a family does to its logits behind the head, a factor or a cap, leaves their order.
        logits = model.get_output_embeddings()(states[:, len(prompt) - 1:][:, :len(answer)])[0]
        logits[:, list(model.generation_config.suppress_tokens or ())] = -torch.inf  # as `generate` does
        likeliest = logits.argmax(1).tolist()
    return [(theirs in chat.stop_ids) if ours == _END else theirs == ours
            for theirs, ours in zip(likeliest, answer, strict=True)]
