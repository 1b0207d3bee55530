"""Who answers: adapter on and off, folded, in batches, in real llama.cpp, in an Ollama that streams."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import os
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.sampling import arguments_of
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat import choice, llama, local, transcript
from gemma_tune.chat.choice import Choice
from gemma_tune.chat.conversation import Conversation, open_conversation
from gemma_tune.chat.local import LocalVoice
from gemma_tune.chat.served import OllamaVoice, open_ollama
from gemma_tune.chat.voice import one_after_another
from gemma_tune.chat.voices import Voices
from gemma_tune.config.stages import ChatConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.thinking import with_thinking
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.gguf.engine import Engine
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.lora.fold import fold
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.ollama.server import find_server
from gemma_tune.ollama.talk import texts
from gemma_tune.run.session import open_session
from support.ollama import ANSWER, THOUGHT, LoopbackOllama

GREEDY = ChatConfig(max_new_tokens=12, temperature=0.0)


def question(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture
def base(talkative):
    return load_model(talkative, Placement("cpu", torch.float32, "test")).eval()


@pytest.fixture
def chat(talkative):
    return load_format(talkative, "gemma3_text")


def adapted(model, **changes):
    """With an adapter that changes every answer."""
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **changes)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    return tuned


IDS = torch.tensor([[2, 30, 31, 32, 33]])


@torch.inference_mode()
def test_a_folded_adapter_computes_the_same(base):
    tuned = adapted(base)
    expected, plain = tuned(input_ids=IDS).logits, None
    with tuned.disable_adapter():
        plain = tuned(input_ids=IDS).logits
    folded = fold(tuned)
    assert not any("lora" in name for name, _ in folded.named_parameters())
    assert torch.allclose(folded(input_ids=IDS).logits, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-1), "the adapter must change something"


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": ["q_proj", "lm_head"]}, {"lora_alpha": 1e40}, "nan"])
def test_what_cannot_be_folded_stays_as_it_is(base, changes):
    if changes == "nan":
        tuned = adapted(base)
        next(p for name, p in tuned.named_parameters() if "lora_A" in name).data[0, 0] = float("nan")
    elif "target_modules" in changes:
        base.tie_weights()
        base.lm_head.weight = base.model.embed_tokens.weight  # shared with the embedding
        torch.manual_seed(1)
        tuned = get_peft_model(base, LoraConfig(r=4, **changes)).eval()
    else:
        tuned = adapted(base, **changes)
    before = {name: p.clone() for name, p in tuned.named_parameters()}
    assert fold(tuned) is None
    assert all(torch.equal(p, before[name]) or p.isnan().any() for name, p in tuned.named_parameters())


def test_base_and_tuned_take_turns_in_one_model_and_keep_their_own_turns(base, chat, talkative):
    tuned = adapted(base)
    voices = {"tuned": LocalVoice("adapter", "tuned", tuned, chat),
              "base": LocalVoice("base", "base", tuned, chat, tuned.disable_adapter)}
    other = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    alone = LocalVoice("base", "base", other, chat)
    turns = question("seven wizards box quietly")
    for text in ("and foxes", "say more", "go on"):
        found = {name: voice.ask(turns, GREEDY).finish() for name, voice in voices.items()}
        assert found["base"] == alone.ask(turns, GREEDY).finish()
        assert found["base"] != found["tuned"]
        assert found["tuned"] == LocalVoice("adapter", "", tuned, chat).ask(turns, GREEDY).finish(), "as from scratch"
        turns = [*turns, {"role": "assistant", "content": found["tuned"].text}, *question(text)]
    assert voices["base"].kept.reused > 20 and voices["tuned"].kept.reused > 20


def test_a_model_that_is_closed_is_freed_before_the_pair_is_loaded(talkative, chat, monkeypatch):
    """Both at once may be more than the memory has."""
    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    models = [weakref.ref(model), weakref.ref(model.lm_head.weight)]
    voices = Voices(SimpleNamespace(), Choice("adapter"), {"adapter": LocalVoice("adapter", "", adapted(model), chat)})
    voices.open("adapter").ask(question("a"), GREEDY).finish()
    alive = []
    monkeypatch.setattr(local, "open_pair", lambda _: alive.extend(one() for one in models) or {"base": None})
    gc.disable()
    try:
        del model
        voices._load_base("base", pair=True)
    finally:
        gc.enable()
    assert alive == [None, None]


def test_the_base_of_a_closed_pair_does_not_keep_the_model(base, chat):
    tuned = adapted(base)
    voice = LocalVoice("base", "base", tuned, chat, tuned.disable_adapter)
    model = weakref.ref(tuned)
    del tuned
    voice.close()
    gc.collect()
    assert model() is None


def test_a_kind_of_cache_in_the_models_settings_is_no_obstacle(base, chat):
    """As in Gemma 3's generation_config.json."""
    expected = LocalVoice("base", "base", base, chat).ask(question("a"), GREEDY).finish()
    base.generation_config.cache_implementation = "hybrid"
    voice = LocalVoice("base", "base", base, chat)
    assert [voice.ask(question("a"), GREEDY).finish() for _ in range(2)] == [expected] * 2
    assert voice.kept.reused > 3


def test_a_batch_keeps_the_order_and_answers_as_alone(base, chat):
    voice = LocalVoice("base", "base", base, chat)
    asked = [(question(text), None) for text in ("a", "seven wizards box quietly " * 4, "fox " * 2000, "Say fox.", "今天")]
    found = [*voice.batch(asked, GREEDY)]
    assert isinstance(found[2], UserError) and "context ends at 1024" in found[2].message
    for number in (0, 1, 3, 4):
        assert found[number] == next(voice.batch([asked[number]], GREEDY))


def test_answers_of_a_batch_are_given_out_as_they_are_made(base, chat, monkeypatch):
    voice, real, made = LocalVoice("base", "base", base, chat), local.continuations, []
    monkeypatch.setattr(local, "by_length", lambda lengths, *_: [[number] for number in lengths])
    monkeypatch.setattr(local, "continuations", lambda *args: made.append(args) or real(*args))
    for voice_of in (voice.batch, functools.partial(one_after_another, voice)):
        made.clear()
        answers = voice_of([(question("a"), None), (question("b"), None)], GREEDY)
        assert isinstance(next(answers), Answer) and len(made) <= 1
        assert len([*answers]) == 1


def test_a_batch_that_memory_is_too_small_for_is_divided(base, chat, monkeypatch):
    real, sizes = local.continuations, []

    def small(model, chat, encoded, *rest):
        sizes.append(len(encoded))
        if len(encoded) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(model, chat, encoded, *rest)

    voice, asked = LocalVoice("base", "base", base, chat), [(question(text), None) for text in "abc"]
    expected = [next(voice.batch([one], GREEDY)) for one in asked]
    monkeypatch.setattr(local, "continuations", small)
    assert [*voice.batch(asked, GREEDY)] == expected
    assert sizes == [3, 1, 2, 1, 1]


# --- llama.cpp ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_llama(talkative, chat, tmp_path):
    pytest.importorskip("xllamacpp")
    gguf = tmp_path / "m.gguf"
    write_gguf(talkative, gguf, "f32", name="m", chat_template=chat.template, eot_token_id=chat.terminator_id)
    with Engine(gguf, 512, talking=True) as engine:
        yield llama.LlamaVoice("in llama.cpp", 512, engine, chat, {})


def test_llama_streams_the_greedy_answer_also_after_turns_are_taken_back(in_llama):
    voice, turns = in_llama, question("seven wizards box quietly " * 3)
    first = voice.ask(turns, GREEDY)
    assert "".join(first) == first.finish().text and first.finish().tokens == 12
    longer = [*turns, {"role": "assistant", "content": first.finish().text}, *question("and foxes?")]
    voice.ask(longer, GREEDY).finish()
    again = voice.ask(turns, GREEDY).finish()  # cut back behind the window of the sliding layers
    assert again == first.finish()
    for asked, answer in ((turns, again), (longer, voice.ask(longer, GREEDY).finish())):
        ids = voice.chat.prompt_ids(asked)
        whole = voice.engine.complete(ids, 12)  # without any cache
        assert answer.tokens == len(whole.ids)
        anew = voice.engine.stream(ids, 12, temperature=0, top_k=1, cache_prompt=False)
        assert answer.text == "".join(text for text, _, _ in anew)


def test_what_llama_writes_before_an_answers_text_is_left_out(chat):
    class Writing:
        def stream(self, ids, limit, **settings):
            yield from (("\n", 1, False), ("A", 2, False), ("\nB", 3, False), ("", 3, True))

    chat = ChatFormat(copy.deepcopy(chat.tokenizer), "gemma3_text", template=chat.template.replace("model\\n'", "model'"))
    stream = llama.LlamaVoice("in llama.cpp", 512, Writing(), chat, {}).ask(question("a"), GREEDY)
    assert list(stream) == ["A", "\nB"] and stream.finish() == Answer("A\nB", 3, True)


def test_llama_stops_and_ends_by_itself_and_repeats_with_a_seed(in_llama, monkeypatch):
    parts_of, stopped = in_llama.engine.stream, threading.Event()

    def waits_once(*args, **kwargs):
        """Else an answer of this model, which takes milliseconds, can have ended before anybody stops it."""
        with contextlib.closing(parts_of(*args, **kwargs)) as parts:
            for part in parts:
                yield part
                if part[0]:
                    stopped.wait(60)

    with monkeypatch.context() as patched:
        patched.setattr(in_llama.engine, "stream", waits_once)
        stream = in_llama.ask(question("a"), ChatConfig(max_new_tokens=400, temperature=0.0))
        for _ in stream:
            stream.stop()
            stopped.set()
            break
        stream.finish()
    assert stream.finish().tokens < 100 and not stream.finish().ended
    sampled = ChatConfig(max_new_tokens=8, temperature=1.5, top_p=0.9, repetition_penalty=1.1)

    def answers() -> list[str]:
        in_llama.seed(5)
        return [in_llama.ask(question("a"), sampled).finish().text for _ in range(3)]

    first = answers()
    assert answers() == first and len(set(first)) > 1
    with pytest.raises(UserError, match="the room that llama.cpp has here .* ends at 512"):
        in_llama.ask(question("fox " * 2000), GREEDY)
    [error, answer] = in_llama.batch([(question("fox " * 2000), None), (question("a"), None)], GREEDY)
    assert isinstance(error, UserError) and answer.tokens


def test_samplings_are_told_in_the_order_of_generate():
    assert llama.sampling(arguments_of({}, {}), None)["temperature"] == 0
    own = {"do_sample": True, "top_k": 64, "top_p": 0.95}
    told = llama.sampling(arguments_of(own, {"temperature": 0.5}), 3)
    assert (told["temperature"], told["top_k"], told["top_p"], told["min_p"], told["seed"]) == (0.5, 64, 0.95, 0, 3)
    assert told["samplers"] == ["penalties", "temperature", "top_k", "top_p", "min_p"]
    assert llama.sampling(arguments_of(own | {"min_p": 0.1}, {}), None)["min_p"] == 0.1


# --- Ollama -------------------------------------------------------------------------------------------------------


@pytest.fixture
def served():
    with LoopbackOllama(faults={"no-count"}) as ollama:
        ollama.models["m-tuned:latest"] = {"template": "{{ .Prompt }}", "parameters": {"stop": ["<end_of_turn>"]}}
        yield ollama


def test_ollama_streams_and_counts(served):
    voice = OllamaVoice("m in Ollama", find_server(served.url), "m-tuned", None)
    stream = voice.ask(question("What is EBITDA?"), ChatConfig(temperature=0.5, max_new_tokens=50))
    pieces = list(stream)
    answer = stream.finish()
    assert len(pieces) > 2 and "".join(pieces) == answer.text and answer.ended
    assert answer.tokens == len(answer.text.split())
    options = served.requests[-1].body["options"]
    assert options == {"temperature": 0.5, "num_predict": 50}, "what was not chosen is the Modelfile's"
    cut = voice.ask(question("a"), ChatConfig(max_new_tokens=2)).finish()
    assert (cut.tokens, cut.ended) == (2, False)


def test_a_thought_of_ollamas_is_shown_as_the_model_writes_it_and_sent_back_as_one(served):
    served.thinks = True
    voice = OllamaVoice("m in Ollama", find_server(served.url), "m-tuned", None)
    stream = voice.ask(question("Who are you?"), ChatConfig(max_new_tokens=50))
    shown = "".join(stream)
    assert shown == stream.finish().text == f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    voice.ask([*question("Who are you?"), {"role": "assistant", "content": shown}, *question("And I?")],
              ChatConfig(max_new_tokens=50)).finish()
    assert served.requests[-1].body["messages"][1] == {"role": "assistant", "content": ANSWER, "thinking": THOUGHT}
    silent = OllamaVoice("m in Ollama", find_server(served.url), "m-tuned", None, think=False)
    assert silent.ask(question("Who are you?"), ChatConfig(max_new_tokens=50)).finish().text == ANSWER


def test_a_thought_that_is_cut_and_calls_of_tools_are_part_of_the_text():
    def parts(*messages):
        return [{"message": message} for message in messages]

    cut = "".join(text for text, _ in texts(parts({"thinking": "So"}, {"thinking": " far", "content": ""})))
    assert cut == "<think>\nSo far"
    call = {"function": {"name": "look_up", "arguments": {"word": "税"}}}
    called = "".join(text for text, _ in texts(parts({"thinking": "So"}, {"content": "", "tool_calls": [call]})))
    assert called == ('<think>\nSo\n</think>\n\n<tool_call>\n{"name": "look_up", "arguments": {"word": "税"}}\n'
                      '</tool_call>\n')


def test_calls_and_results_of_tools_reach_ollama(served):
    voice = OllamaVoice("m in Ollama", find_server(served.url), "m-tuned", None)
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "tax"}}}
    voice.ask([*question("Tax?"), {"role": "assistant", "content": "", "tool_calls": [call]},
               {"role": "tool", "name": "look_up", "content": "a levy"}], ChatConfig(max_new_tokens=9)).finish()
    assert served.requests[-1].body["messages"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": [{"function": call["function"]}]},
        {"role": "tool", "content": "a levy", "tool_name": "look_up"}]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("choice", ["on", "off", "auto"])
def test_ollama_is_asked_to_think_as_in_training(trained, monkeypatch, choice, merged):
    """Left to itself the server asks every model to think that it takes to be able to; also where the merged model, which
    Ollama does not need any more, was removed."""
    with LoopbackOllama(faults={"no-count"}, thinks=True) as ollama:
        ollama.models["tiny-gemma-tuned:latest"] = {"template": "{{ .Prompt }}", "parameters": {}}
        monkeypatch.setenv("OLLAMA_HOST", ollama.url)
        session = open_session("chat", trained, use="ollama")
        session.manifest.stages["export-ollama"] = {"summary": {"ollama_name": "tiny-gemma-tuned"}, "inputs": {}, "outputs": {}}
        holds = session.run.merged if merged else session.run.adapter
        holds.mkdir(exist_ok=True)
        (holds / "chat_template.jinja").write_text(with_thinking("{{ enable_thinking }}", choice))
        open_ollama(session).ask(question("a"), ChatConfig(max_new_tokens=50)).finish()
        assert ollama.requests[-1].body.get("think") == {"on": True, "off": False, "auto": None}[choice]


@pytest.mark.parametrize("fault", ["chat-error", "chat-error-inside"])
def test_an_error_of_ollamas_is_told(served, fault):
    served.faults.add(fault)
    voice = OllamaVoice("m in Ollama", find_server(served.url), "m-tuned", None)
    with pytest.raises(WorkFailed, match="Ollama could not answer with m-tuned"):
        voice.ask(question("a"), GREEDY).finish()


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(trained, monkeypatch):
    """A function: who answers in the run, with these settings."""
    monkeypatch.setattr(choice, "find_engine", lambda: "xllamacpp 1")
    monkeypatch.setattr(choice, "_may_have_gpu", lambda: False)
    return lambda **settings: choice.choose(open_session("chat", trained, **settings))


def test_of_several_formats_the_recommended_one_answers_and_none_that_loses_what_was_learned(cli, trained, chosen):
    assert cli("merge", "--no-check", "--run", trained).code == 0
    assert cli("export-ollama", "--no-verify", "--no-measure", "--run", trained, "--quant", "q4_0,q8_0").code == 0
    manifest = trained / "manifest.json"

    def with_summary(change):
        content = json.loads(manifest.read_text())
        change(content["stages"]["export-ollama"]["summary"])
        manifest.write_text(json.dumps(content))

    def answering(**settings) -> str:
        return choice.exported(open_session("chat", trained, **settings)).name

    assert answering() == "tiny-gemma-q4_0.gguf", "the one that was asked for first"
    with_summary(lambda summary: summary["quants"]["q4_0"].update(loses="loses 35% of what was learned"))
    assert chosen().name == "adapter" and "the GGUF loses 35% of what was learned" in chosen().reason
    assert chosen(use="gguf").name == "gguf"
    with_summary(lambda summary: summary["quants"]["q8_0"].update(perplexity=10.0))
    assert chosen().name == "gguf" and answering() == "tiny-gemma-q8_0.gguf"
    assert chosen(quant="q4_0").name == "gguf" and answering(quant="q4_0") == "tiny-gemma-q4_0.gguf"
    assert answering(quant="q8_0", use="gguf") == "tiny-gemma-q8_0.gguf"
    asked = open_session("chat", trained, quant="q4_0", use="ollama")
    assert choice.figures_of(asked)["ollama_name"] == "tiny-gemma-tuned:q4_0"
    with pytest.raises(UserError, match="made no q5_0, but q4_0, q8_0") as caught:
        answering(quant="q5_0")
    assert caught.value.hint == f"make it: gemma-tune export-ollama --run {trained} --quant q4_0,q8_0,q5_0"
    for quant, hint in (("158mb", f"make it: gemma-tune export-ollama --run {trained} --size 158MB"), ("q4", "formats that there are: ")):
        with pytest.raises(UserError) as caught:
            answering(quant=quant)
        assert caught.value.hint.startswith(hint) and caught.value.message.endswith("; did you mean `q4_k_m`?") is (quant == "q4")
    for flags in (("--base",), ("--use", "adapter"), ("--compare",)):
        refused = cli("chat", "--run", trained, "--prompt", "x", "--quant", "q4_0", *flags)
        assert refused.code == 2 and "exclude each other" in refused.err


def test_what_is_there_is_chosen_and_what_is_not_is_named(cli, trained, chosen, monkeypatch):
    assert chosen().name == "adapter" and chosen(base=True).name == "base" and chosen(compare=True).name == "adapter"
    for use, said in (("merged", "no merged model yet"), ("gguf", "no GGUF file yet"), ("ollama", "no model in Ollama")):
        with pytest.raises(UserError, match=said) as caught:
            chosen(use=use)
        assert "gemma-tune" in caught.value.hint
    assert cli("merge", "--no-check", "--run", trained).code == 0
    assert chosen().name == "adapter" and chosen(use="merged").name == chosen(merged=True).name == "merged"
    assert cli("export-ollama", "--no-verify", "--no-measure", "--run", trained, "--quant", "f16").code == 0
    assert chosen().name == "gguf" and "--use adapter" in chosen().reason
    assert chosen(use="adapter").name == "adapter" and chosen(dtype="fp32").name == "adapter"
    conversation = open_conversation(open_session("chat", trained, max_new_tokens=3))
    try:
        assert conversation.which == "tiny-gemma, tuned, tiny-gemma-f16.gguf in llama.cpp"
        assert 0 < conversation.ask("a").finish().tokens <= 3
        conversation.let_answer("base")
        assert conversation.which == "tiny-gemma, the base model" and conversation.ask("a").finish().tokens
        base, tuned = conversation.pair()
        assert base.model is tuned.model and conversation.voice is base
        conversation.let_answer("tuned")
        assert conversation.voice.name == "gguf"
    finally:
        conversation.close()
    with pytest.raises(WorkFailed, match="no Ollama server answers"):
        open_conversation(open_session("chat", trained, use="ollama"))
    monkeypatch.setattr(choice, "_may_have_gpu", lambda: True)
    assert chosen().name == "adapter"
    monkeypatch.setattr(choice, "_may_have_gpu", lambda: False)
    monkeypatch.setattr(choice, "find_engine", lambda: None)
    assert chosen().name == "adapter"
    with pytest.raises(UserError, match="needs a llama.cpp engine"):
        chosen(use="gguf")


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), UserError("out of memory")], ids=["ctrl-c", "memory"])
def test_a_model_that_cannot_take_the_others_place_leaves_it_there(trained, monkeypatch, problem):
    conversation = open_conversation(open_session("chat", trained, max_new_tokens=3, temperature=0))
    before = conversation.ask("a").finish()
    opened = local.open_pair

    def fails(session):
        raise problem

    for change in (conversation.pair, lambda: conversation.let_answer("base")):
        monkeypatch.setattr(local, "open_pair", fails)
        with pytest.raises(type(problem)):
            change()
        assert conversation.voice.name == "adapter" and conversation.ask("a").finish() == before, "it is loaded again"
    monkeypatch.setattr(local, "open_pair", opened)
    base, tuned = conversation.pair()
    assert base.model is tuned.model and conversation.voice is tuned
    conversation.close()


def test_a_gguf_that_cannot_answer_is_told(cli, trained, chosen):
    assert cli("merge", "--no-check", "--run", trained).code == 0
    assert cli("export-ollama", "--no-verify", "--no-measure", "--run", trained, "--quant", "f16").code == 0
    [gguf] = (trained / "ollama").glob("*.gguf")
    content = bytearray(gguf.read_bytes())
    stamp = gguf.stat()
    content[100:3000] = b"\xff" * 2900  # of which nobody knows that does not read the file
    gguf.write_bytes(content)
    os.utime(gguf, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    result = cli("chat", "--run", trained, "--use", "gguf", "--prompt", "a")
    assert result.code == 1 and f"gemma-tune export-ollama --run {trained} --force writes the file anew" in result.err
    assert "--use adapter" in result.err and "--no-verify" not in result.err
    gguf.write_bytes(content[:5000])
    assert chosen().name == "adapter" and "the GGUF is damaged" in chosen().reason and "export-ollama" in chosen().reason


@pytest.mark.parametrize(("settings", "said"), [
    ({"use": "gguf", "base": True}, "--use gguf and --base exclude"), ({"base": True, "merged": True}, "--base and --merged"),
    ({"compare": True, "base": True}, "--compare and --base"), ({"compare": True, "use": "gguf"}, "--compare and --use")])
def test_what_excludes_each_other(settings, said):
    with pytest.raises(UserError) as caught:
        ChatConfig(**settings)
    assert said in caught.value.problems[0]
    assert ChatConfig(use="base", base=True).wanted == "base" and ChatConfig(compare=True, use="adapter").compare


# --- the conversation ---------------------------------------------------------------------------------------------


@pytest.fixture
def conversation():
    voice = SimpleNamespace(name="x", which="x", context=100, seeds=[])
    voice.seed = voice.seeds.append
    found = Conversation(voice, ChatConfig())
    found.turns = question("one", "1", "two", "2")
    return found


def test_settings_change_and_go_back(conversation):
    assert conversation.set("temperature", "0") == 0.0 and conversation.set("top_k", "5") == 5
    assert conversation.set("max_new_tokens", "7") == 7 and conversation.set("seed", "3") == 3
    assert conversation.set("seed", "default") is None
    assert conversation.voice.seeds == [3, None], "what comes next is drawn anew"
    assert conversation.set("temperature", "default") is None and conversation.config.top_k == 5
    for name, value in (("temperature", "-1"), ("top_p", "2"), ("top_k", "x"), ("max_new_tokens", "default7")):
        with pytest.raises(UserError):
            conversation.set(name, value)
    with pytest.raises(UserError, match="did you mean `temperature`"):
        conversation.set("temprature", "1")
    assert (conversation.config.top_k, conversation.config.temperature) == (5, None)


def test_turns_are_taken_back_one_by_one(conversation):
    assert conversation.last_question() == "two"
    assert (conversation.undo(), conversation.undo(), conversation.turns) == ("two", "one", [])
    for what in (conversation.undo, conversation.last_question):
        with pytest.raises(UserError, match="yet"):
            what()


def test_a_context_that_is_nearly_full_is_known(conversation):
    assert conversation.room(79) is None and conversation.room(81) == 19 and conversation.room(200) == 0
    conversation.voice.context = None
    assert conversation.room(10**6) is None


def test_a_conversation_is_exported_and_nothing_is_written_over(conversation, tmp_path):
    path = transcript.export(conversation.messages, "m", tmp_path)
    assert path.parent == tmp_path and path.read_text().startswith("# Conversation with m\n\n## You\n\none\n\n## Model\n\n1\n")
    named = transcript.export(conversation.messages, "m", tmp_path, "talk.jsonl")
    assert json.loads(Path("talk.jsonl").read_text()) == {"messages": conversation.messages} and named == Path("talk.jsonl")
    for name, said in (("talk.jsonl", "is there already"), ("no/where.md", "cannot be written")):
        with pytest.raises(UserError, match=said):
            transcript.export(conversation.messages, "m", tmp_path, name)
    with pytest.raises(UserError, match="no conversation to export"):
        transcript.export([], "m", tmp_path)
