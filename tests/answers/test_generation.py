"""Answers: batches against single prompts, limits, sampling settings, and streams that are stopped or fail."""

from __future__ import annotations

import functools
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from gemma_tune.answers.generation import (
    greedy_continuations,
    room_for_answer,
)
from gemma_tune.answers.sampling import sampling_arguments
from gemma_tune.answers.stream import Pieces, Stream
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.answering import greedy_answers
from support.models import make_model
from support.templates import gpt_oss_tokenizer

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A head of its own: with tied embeddings, a random model only repeats the last token of the prompt."""
    return make_model(tmp_path_factory.mktemp("models") / "lively", tie_word_embeddings=False, initializer_range=0.2)


@pytest.fixture
def model(checkpoint):
    """In fp32, where a padded batch and a single prompt differ by rounding alone. A fresh one, as tests change it."""
    return load_model(checkpoint, Placement("cpu", torch.float32, "test")).eval()


@pytest.fixture(scope="module")
def chat(checkpoint):
    return load_format(checkpoint, "gemma3_text")


def script(model, rows: list[list[int]], at=lambda step: None) -> None:
    """Make the model write these tokens, one list per row of the batch; ``at`` is called before each step (1, 2, …)."""
    original, step = model.forward, 0

    @functools.wraps(original)
    def forward(*args, **kwargs):
        nonlocal step
        step += 1
        at(step)
        out = original(*args, **kwargs)
        for row, tokens in enumerate(rows):
            out.logits[row, -1] = -100.0
            out.logits[row, -1, tokens[min(step, len(tokens)) - 1]] = 100.0
        return out

    model.forward = forward


def ids_of(chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


# --- batches ------------------------------------------------------------------------------------------------------


def test_a_padded_batch_answers_as_each_prompt_alone(model, chat):
    prompts = [question(text) for text in ("a", "seven wizards box quietly, " * 6, "Say fox.", "今天天气很好" * 3)]
    lengths = {len(chat.prompt_ids(p)) for p in prompts}
    assert len(lengths) == len(prompts), "the batch must need padding"
    together = greedy_answers(model, chat, prompts, 12)
    alone = [greedy_answers(model, chat, [p], 12)[0] for p in prompts]
    assert together == alone
    assert len({a.text for a in alone}) == len(prompts), "answers that are all the same would prove nothing"


def test_ended_tells_an_answer_that_ends_from_one_that_is_cut(model, chat):
    fox, eos = ids_of(chat, "fox"), chat.tokenizer.eos_token_id
    script(model, [[*fox, chat.terminator_id], [*fox, *fox, eos], fox * 10])
    by_terminator, by_eos, cut = greedy_answers(model, chat, [question("a")] * 3, 3 * len(fox))
    assert (by_terminator.text, by_terminator.tokens, by_terminator.ended) == ("fox", len(fox), True)
    assert (by_eos.text, by_eos.tokens, by_eos.ended) == ("foxfox", 2 * len(fox), True)
    assert (cut.text, cut.tokens, cut.ended) == ("foxfoxfox", 3 * len(fox), False)


def test_an_answer_may_be_empty(model, chat):
    script(model, [[chat.terminator_id]])
    [answer] = greedy_answers(model, chat, [question("a")], 5)
    assert (answer.text, answer.tokens, answer.ended) == ("", 0, True)


def test_an_answer_is_cut_off_when_its_time_is_over(model, chat):
    script(model, [ids_of(chat, "fox") * 100], at=lambda step: time.sleep(0.02))
    [answer] = greedy_continuations(model, chat, [chat.prompt_ids(question("a"))], 100, seconds=0.1)
    assert 0 < answer.tokens <= 5 and not answer.ended
    [whole] = greedy_continuations(model, chat, [chat.prompt_ids(question("a"))], 9, seconds=100.0)
    assert whole.tokens == 9


def test_greedy_answers_ignore_that_the_model_samples_by_itself(model, chat):
    [expected] = greedy_answers(model, chat, [question("a")], 16)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=0, top_p=1.0)
    for seed in range(3):
        torch.manual_seed(seed)
        assert greedy_answers(model, chat, [question("a")], 16) == [expected]


class Asked:
    """A chat format that notes what is asked of it, and renders the tools on offer as a first turn."""

    def __init__(self, chat):
        self.stop_ids, self.said, self.decoded, self.asked, self._chat = chat.stop_ids, chat.said, chat.decoded, [], chat
        self.tokenizer = chat.tokenizer

    def refuse_left_out(self, messages, tools=None):
        pass

    def prompt_ids(self, messages, tools=None):
        self.asked.append((messages, tools))
        if messages == question("refused"):
            raise FormatError("the template has no place for this")
        return self._chat.prompt_ids([{"role": "system", "content": json.dumps(tools)}, *messages] if tools else messages)


TOOLS = [{"type": "function", "function": {"name": "fox", "parameters": {}}}]


def test_tools_go_to_the_template_with_their_own_prompt(model, chat):
    asked = Asked(chat)
    prompts, tools = [question("a"), question("b"), question("a")], [TOOLS, None, None]
    answers = greedy_answers(model, asked, prompts, 8, tools)
    assert asked.asked == list(zip(prompts, tools))
    assert answers == [greedy_answers(model, asked, [p], 8, [t])[0] for p, t in zip(prompts, tools)]
    assert answers[0] != answers[2], "the tools must change the answer"
    stream = Stream(model, asked, question("a"), 8, GREEDY, TOOLS)
    list(stream)
    assert asked.asked[-1] == (question("a"), TOOLS)
    assert stream.finish().tokens == answers[0].tokens


def test_a_conversation_that_the_template_refuses_is_an_error_for_people(model, chat):
    for ask in (lambda: greedy_answers(model, Asked(chat), [question("a"), question("refused")], 8),
                lambda: Stream(model, Asked(chat), question("refused"), 8, GREEDY)):
        with pytest.raises(UserError, match="the template has no place for this") as e:
            ask()
        assert "/reset" in e.value.hint


# --- the end of the context ---------------------------------------------------------------------------------------


def test_room_for_an_answer():
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=100)))
    assert room_for_answer(model, 10, 50) == 50
    assert room_for_answer(model, 60, 50) == 40
    assert room_for_answer(model, 99, 50) == 1
    for tokens in (100, 101):
        with pytest.raises(UserError, match=f"has {tokens} tokens; the model's context ends at 100") as e:
            room_for_answer(model, tokens, 50)
        assert "/reset" in e.value.hint


def test_an_answer_stops_at_the_end_of_the_context(chat, checkpoint):
    model = load_model(checkpoint, Placement("cpu", torch.float32, "test")).eval()
    prompt = question("a b c")
    model.config.max_position_embeddings = len(chat.prompt_ids(prompt)) + 3
    script(model, [ids_of(chat, "x")])
    [answer] = greedy_answers(model, chat, [prompt], 50)
    assert (answer.tokens, answer.ended) == (3, False)
    stream = Stream(model, chat, prompt, 50, GREEDY)
    assert "".join(stream) == "xxx"
    assert stream.finish() == answer
    with pytest.raises(UserError, match="context ends at"):
        Stream(model, chat, question("a b c d e f g"), 50, GREEDY)


# --- sampling -----------------------------------------------------------------------------------------------------


def arguments(own: dict, **chosen):
    return sampling_arguments(SimpleNamespace(generation_config=GenerationConfig(**own)), chosen)


GEMMA_3 = dict(do_sample=True, temperature=0.8, top_k=64, top_p=0.95)


@pytest.mark.parametrize(("own", "chosen", "expected"), [
    (GEMMA_3, {}, GEMMA_3),
    (GEMMA_3, dict(temperature=None, top_p=None, top_k=None, repetition_penalty=None), GEMMA_3),
    (GEMMA_3, dict(temperature=0.3), {**GEMMA_3, "temperature": 0.3}),
    (GEMMA_3, dict(top_p=0.5, top_k=7), {**GEMMA_3, "top_p": 0.5, "top_k": 7}),
    (GEMMA_3, dict(top_k=0), {**GEMMA_3, "top_k": 0}),
    (GEMMA_3, dict(temperature=0.0), GREEDY),
    (GEMMA_3, dict(temperature=0.0, top_p=0.5), GREEDY),
    (dict(do_sample=True), {}, dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=50)),
    (dict(do_sample=True, temperature=0.6, top_p=0.9, min_p=0.05), {}, dict(do_sample=True, temperature=0.6, top_p=0.9, top_k=50, min_p=0.05)),
    (dict(do_sample=True, min_p=0.05), dict(temperature=0.0), GREEDY),
    ({}, {}, GREEDY),
    (dict(do_sample=False), dict(temperature=None), GREEDY),
    ({}, dict(temperature=0.7), dict(do_sample=True, temperature=0.7, top_p=1.0, top_k=50)),
    ({}, dict(top_p=0.9), dict(do_sample=True, temperature=1.0, top_p=0.9, top_k=50)),
    ({}, dict(top_k=5), dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=5)),
    ({}, dict(repetition_penalty=1.3), {**GREEDY, "repetition_penalty": 1.3}),
    (dict(repetition_penalty=1.1), {}, {**GREEDY, "repetition_penalty": 1.1}),
    ({**GEMMA_3, "repetition_penalty": 1.1}, dict(repetition_penalty=1.0), {**GEMMA_3, "repetition_penalty": 1.0}),
])
def test_sampling_is_what_was_chosen_else_the_models_own(own, chosen, expected):
    assert arguments(own, **chosen) == expected


def test_what_nobody_chose_is_what_generate_takes_for_it():
    from gemma_tune.answers.sampling import _UNSET

    theirs = GenerationConfig._get_default_generation_params()
    assert {name: theirs[name] for name in _UNSET} == _UNSET


def test_a_temperature_in_the_settings_of_a_greedy_model_does_not_make_it_sample():
    config = GenerationConfig()
    config.temperature = 0.6  # a file may say so without do_sample
    assert sampling_arguments(SimpleNamespace(generation_config=config), {}) == GREEDY


def test_a_repetition_penalty_arrives_in_the_model(model, chat):
    ids = torch.tensor([chat.prompt_ids(question("a"))])

    def made(**chosen) -> list[int]:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=0,
                             eos_token_id=chat.stop_ids, **sampling_arguments(model, {"temperature": 0.0, **chosen}))
        return out[0, ids.shape[1]:].tolist()

    plain, penalised = made(), made(repetition_penalty=1e6)
    assert len(set(plain)) < len(plain), "the model must repeat itself without"
    assert len(set(penalised)) == len(penalised)


def test_a_seed_repeats_and_another_one_does_not(model, chat):
    def sampled(seed: int) -> str:
        torch.manual_seed(seed)
        return "".join(Stream(model, chat, question("a"), 16, sampling_arguments(model, {"temperature": 1.5})))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


# --- streams ------------------------------------------------------------------------------------------------------


def test_pieces_add_up_to_the_answer_which_is_the_batchs(model, chat):
    text = "The quick brown fox.\n\n  jumps over\n the lazy dog "
    script(model, [[*ids_of(chat, text), chat.terminator_id]])
    stream = Stream(model, chat, question("a"), 100, GREEDY)
    pieces = list(stream)
    answer = stream.finish()
    assert "".join(pieces) == text
    assert len(pieces) > 5 and all(pieces)
    assert (answer.text, answer.tokens, answer.ended) == (text, len(ids_of(chat, text)), True)
    del model.forward
    script(model, [[*ids_of(chat, text), chat.terminator_id]])
    assert greedy_answers(model, chat, [question("a")], 100) == [answer]


LEADING = """{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}
{{ m.content }}<end_of_turn>{% endfor %}{% if add_generation_prompt %}<start_of_turn>model{% endif %}"""


@pytest.mark.parametrize("written", ["\nA fox.\nA dog", "\n\nA fox", "A fox", "\n", ""])
def test_a_line_break_that_the_template_writes_before_an_answer_is_no_text_of_it(model, checkpoint, written):
    """Else it would stand there twice in the next prompt, as never in training."""
    chat = ChatFormat(load_format(checkpoint, "gemma3_text").tokenizer, "gemma3_text", template=LEADING)
    script(model, [[*ids_of(chat, written), chat.terminator_id]])
    stream = Stream(model, chat, question("a"), 100, GREEDY)
    pieces, answer = list(stream), stream.finish()
    assert "".join(pieces) == answer.text == written.removeprefix("\n") and all(pieces)
    assert answer.tokens == len(ids_of(chat, written))
    del model.forward
    script(model, [[*ids_of(chat, written), chat.terminator_id]])
    assert greedy_answers(model, chat, [question("a")], 100) == [answer]
    turns = [*question("a"), {"role": "assistant", "content": answer.text}, *question("b")]
    if written.startswith("\n"):
        assert chat.prompt_text(turns).startswith(chat.prompt_text(question("a")) + written + chat.terminator)


@pytest.mark.parametrize("text", ["今天天气很好", "龘龘龘", "a🦊b😀🦊 c", "Grüße 👩‍👩‍👧 é", "好🦊\n\n龘"])
def test_characters_of_several_tokens_come_whole(model, chat, text):
    ids = ids_of(chat, text)
    script(model, [[*ids, chat.terminator_id]])
    pieces = list(Stream(model, chat, question("a"), 100, GREEDY))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_no_space_is_lost_between_pieces(model, checkpoint):
    """Llama's decoder drops a space at the start of what it decodes, so a token decoded alone would lose its own."""
    from tokenizers import decoders

    chat = load_format(checkpoint, "gemma3_text")
    chat.tokenizer.backend_tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    text = "the lazy dog\n jumps"
    ids = ids_of(chat, text)
    assert "".join(chat.tokenizer.decode([n]) for n in ids) != text
    script(model, [[*ids, chat.terminator_id]])
    assert "".join(Stream(model, chat, question("a"), 100, GREEDY)) == text


@pytest.mark.parametrize("made", range(1, 9))
def test_a_character_that_the_limit_cuts_is_left_out(model, chat, made):
    ids = ids_of(chat, "ab龘🦊")
    assert len(ids) == len("ab龘🦊".encode()) == 9, "one token per byte"
    expected = "ab龘🦊".encode()[:made].decode(errors="ignore")
    script(model, [ids])
    stream = Stream(model, chat, question("a"), made, GREEDY)
    assert "".join(stream) == expected
    assert (stream.finish().text, stream.finish().tokens) == (expected, made)
    del model.forward
    script(model, [ids])
    [answer] = greedy_answers(model, chat, [question("a")], made)
    assert (answer.text, answer.tokens) == (expected, made)


def test_what_ends_an_answer_is_never_shown_even_if_it_is_no_special_token(model, chat):
    [end] = ids_of(chat, "z")
    fox = ids_of(chat, "fox")
    plain = SimpleNamespace(tokenizer=chat.tokenizer, prompt_ids=chat.prompt_ids, stop_ids=[1, end],
                            refuse_left_out=chat.refuse_left_out, said=chat.said, decoded=chat.decoded)
    script(model, [[*fox, end]])
    stream = Stream(model, plain, question("a"), 100, GREEDY)
    assert "".join(stream) == "fox"
    assert stream.finish().ended


def test_stop_ends_the_answer_after_the_current_token(model, chat):
    begun, stream = threading.Event(), None

    def at(step: int) -> None:
        if step == 3:
            assert begun.wait(10)
            stream.stop()

    script(model, [ids_of(chat, "x")], at)
    stream = Stream(model, chat, question("a"), 500, GREEDY)
    begun.set()
    assert "".join(stream) == "xxx"
    answer = stream.finish()
    assert (answer.text, answer.tokens, answer.ended) == ("xxx", 3, False)


def test_an_answer_that_nobody_reads_can_be_finished(model, chat):
    script(model, [[*ids_of(chat, "x"), chat.terminator_id]])
    stream = Stream(model, chat, question("a"), 500, GREEDY)
    stream.stop()
    assert stream.finish().text == "x"


def test_a_failure_in_the_thread_reaches_the_reader(model, chat):
    def at(step: int) -> None:
        if step == 3:
            raise OSError("no more")

    script(model, [ids_of(chat, "x")], at)
    stream = Stream(model, chat, question("a"), 500, GREEDY)
    assert "".join(stream) == "xx", "the reader's loop ends"
    with pytest.raises(OSError, match="no more"):
        stream.finish()


@pytest.mark.parametrize(("error", "on_gpu"), [(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
                                               (MemoryError(), False)], ids=["gpu", "cpu"])
def test_memory_that_runs_out_amid_an_answer_is_no_fault_of_ours(model, chat, error, on_gpu):
    """A conversation goes on after it, with a shorter question."""
    def at(step: int) -> None:
        if step == 3:
            raise error

    script(model, [ids_of(chat, "x")], at)
    stream = Stream(model, chat, question("a"), 500, GREEDY)
    assert "".join(stream) == "xx"
    with pytest.raises(UserError, match="out of memory: (CUDA|MemoryError)") as raised:
        stream.finish()
    assert "--max-new-tokens" in raised.value.hint and ("CUDA_VISIBLE_DEVICES=-1" in raised.value.hint) == on_gpu


@pytest.mark.parametrize(("written", "said"), [
    ("<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>a 1", "a 1"),
    ("<|channel|>final<|message|>a<|channel|>", "a<|channel|>"), ("<|channel|>analysis<|message|>why", "analysiswhy"), ("plain", "plain")])
def test_of_gpt_oss_the_final_channel_is_what_is_said(written, said):
    chat = ChatFormat(gpt_oss_tokenizer(), "gpt_oss")
    ids = chat.tokenizer(written, add_special_tokens=False).input_ids
    assert chat.said(chat.decoded(ids)) == said
    pieces = Pieces(chat)
    pieces.put(torch.tensor([[1, 2]]))
    for token in ids:
        pieces.put(torch.tensor([token]))
    early = pieces.text
    pieces.end()
    assert "".join(pieces) == pieces.text == said
    assert early == (said if "final" in written else ""), "it may all be reasoning"
