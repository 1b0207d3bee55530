"""The loop with a cache of fixed size against ``generate``: the same ids, and what may end or break it."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gemma_tune.answers import decoders, decoding, routing
from gemma_tune.answers.generation import continuations, greedy_continuations
from gemma_tune.answers.sampling import sampling_arguments
from gemma_tune.answers.stream import Stream
from gemma_tune.base.capturing import grouped_products_wait
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.another_device import THERE, Operations, computing_there, there
from support.gemmas import FAMILIES, make_family
from support.graphs import Graph, install
from support.llamas import make_llama

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
FP32 = Placement("cpu", torch.float32, "test")
PROMPTS = [list(range(40, 75)), [50, 61, 72], list(range(90, 102))]


@pytest.fixture
def model(talkative):
    return load_model(talkative, FP32).eval()


@pytest.fixture(scope="module")
def chat(talkative):
    return load_format(talkative, "gemma3_text")


@pytest.fixture
def on_cpu(monkeypatch):
    """Let answers be made by the loop here, as on a GPU but without capture."""
    monkeypatch.setattr(decoding, "pays", lambda model: model not in decoders._given_up and not decoding.unknown(model))


def batch(prompts=PROMPTS, device="cpu"):
    """Prompts padded on the left, and where they are not."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)


def ours(model, prompts=PROMPTS, limit=24, stops=(1,), arguments=GREEDY, every=5, **how):
    """What the loop makes of each prompt, up to where all have ended."""
    ids, mask = batch(prompts, model.device)
    with torch.inference_mode():
        groups = list(decoding.decoded(model, ids, mask, stop_ids=stops, pad=0, limit=limit, arguments=arguments,
                                       every=every, **how))
    made = [list(itertools.chain.from_iterable(row)) for row in zip(*groups)]
    ends = [next((n + 1 for n, token in enumerate(row) if token in stops), limit) for row in made]
    assert all(token == 0 for row, end in zip(made, ends) for token in row[end:]), "padding follows an end"
    return [row[:max(ends)] for row in made]


def theirs(model, prompts=PROMPTS, limit=24, stops=(1,), arguments=GREEDY):
    """The same from ``generate``."""
    ids, mask = batch(prompts, model.device)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, eos_token_id=list(stops),
                             max_new_tokens=limit, **arguments)
    return [row[ids.shape[1]:].tolist() for row in out]


# --- the same ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gemma_writes_what_generate_writes(family, tmp_path):
    """Their windows are 8 positions wide: prompts fill them, or fill them on the way."""
    model = make_family(family, tmp_path)
    assert not decoding.unknown(model)
    made = ours(model)
    assert made == theirs(model)
    assert len(set(map(tuple, made))) == len(PROMPTS), "answers that are all the same would prove nothing"


@pytest.mark.parametrize("name", ["smollm2", "mistral", "qwen3"])
def test_other_families_as_well(name, tmp_path):
    model, _ = make_llama(name, tmp_path)
    assert not decoding.unknown(model)
    assert ours(model) == theirs(model)
    assert ours(model, PROMPTS[:1]) == theirs(model, PROMPTS[:1])


def test_a_row_that_ends_is_padded_while_others_go_on(model):
    made = theirs(model, limit=12)
    stops = (made[0][3], made[1][7])
    expected = theirs(model, limit=12, stops=stops)
    assert 0 in expected[0]
    for every in (1, 4, 50):
        assert ours(model, limit=12, stops=stops, every=every) == expected


def test_nothing_is_made_once_all_rows_have_ended(model):
    [made] = theirs(model, PROMPTS[:1], limit=20)
    groups = list(decoding.decoded(model, *batch(PROMPTS[:1]), stop_ids=[made[4]], pad=0, limit=20, arguments=GREEDY,
                                   every=2))
    assert list(itertools.chain(*(row for [row] in groups)))[:5] == made[:5]
    assert len(groups) <= 3


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9])
def test_the_limit_counts_exactly(model, limit):
    made = ours(model, limit=limit, stops=(), every=4)
    assert made == theirs(model, limit=limit)
    assert {len(row) for row in made} == {limit}


def test_a_cache_grows_with_its_answer(model, monkeypatch):
    monkeypatch.setattr(decoders, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "ROOM", 4)
    assert ours(model, limit=70) == theirs(model, limit=70)
    assert [decoder.size for decoder in decoders._kept[model]] == [128]


def test_a_cache_is_used_again_and_goes_with_its_model(model):
    first = ours(model)
    [decoder] = decoders._kept[model]
    assert ours(model, [PROMPTS[1]] * 3) == theirs(model, [PROMPTS[1]] * 3)
    assert ours(model) == first, "nothing of the answer in between is left"
    assert decoders._kept[model] == [decoder]
    for rows in (1, 2):
        ours(model, PROMPTS[:rows])
    assert [len(decoder.ids) for decoder in decoders._kept[model]] == [1, 2], "few are kept"


def read_and_written(model, prompt, limit=6) -> list[int]:
    return prompt + ours(model, [prompt], limit=limit, stops=())[0]


def first_read(model, prompt) -> int:
    """How many positions of a prompt are read before the first token, which is that of ``generate``, as all others."""
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, how: seen.append(how["input_ids"].shape[1]), with_kwargs=True)
    made = ours(model, [prompt], stops=())
    handle.remove()
    assert made == theirs(model, [prompt], stops=())
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_reads_only_what_is_new(family, tmp_path):
    model = make_family(family, tmp_path)
    turn = list(range(40, 75))
    assert first_read(model, turn) == 35
    for new in ([50, 61, 72], [90] * 9, list(range(100, 112))):
        turn = read_and_written(model, turn) + new
        assert first_read(model, turn) == len(new) + 1, "the answer's last token had not been read"


def test_a_conversation_that_is_taken_back_is_cut_there(model):
    first = list(range(40, 75))
    read_and_written(model, read_and_written(model, first) + [50, 61, 72])
    assert first_read(model, first + [33, 34]) == 2
    assert first_read(model, first + [33, 34]) == 1, "the same again: its last token, whose logits are wanted"
    assert first_read(model, first) == 1


def test_another_conversation_is_read_from_its_beginning(model):
    first = list(range(40, 75))
    read_and_written(model, first)
    other = first[:10] + list(range(90, 130))
    assert first_read(model, other) == len(other)
    assert ours(model, [PROMPTS[0], other]) == theirs(model, [PROMPTS[0], other])
    assert first_read(model, [*other, 41]) == 1, "what several rows have read is in another cache"


def test_what_was_read_moves_to_a_larger_cache(model, monkeypatch):
    monkeypatch.setattr(decoders, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "ROOM", 4)
    turn = read_and_written(model, list(range(40, 52))) + list(range(90, 102))
    assert first_read(model, turn) == 13
    assert {decoder.size for decoder in decoders._kept[model]} == {64}


def adapted(talkative):
    torch.manual_seed(0)
    return get_peft_model(load_model(talkative, FP32).eval(), LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)).eval()


def test_what_an_adapter_has_read_is_read_again_without_it(talkative):
    model = adapted(talkative)
    turn = read_and_written(model, list(range(40, 75))) + [50, 61]
    with model.disable_adapter():
        assert first_read(model, turn) == len(turn)
        assert first_read(model, [*turn, 43]) == 1


def test_base_and_adapter_keep_a_conversation_each(talkative):
    """As two that are compared: every turn is answered by both, and each reads only what is new to it."""
    model, turn = adapted(talkative), list(range(40, 75))
    for _ in range(2):
        tuned = read_and_written(model, turn)
        with model.disable_adapter():
            base = read_and_written(model, turn)
        assert tuned != base
        assert first_read(model, tuned) == 1
        with model.disable_adapter():
            assert first_read(model, base) == 1
        turn = [*tuned, 50, 61]
    assert len(decoders._kept[model]) == 2
    assert first_read(model, turn) == 2, "and what is answered next goes on from its own"
    # A batch in between takes the place of one of them, and not of the one that spoke last.
    ours(model)
    assert len(decoders._kept[model]) == 2 and first_read(model, turn) == 1


def test_a_cache_goes_with_its_model(talkative):
    model = load_model(talkative, FP32).eval()
    ours(model)
    keys = weakref.ref(decoders._kept[model][0].cache.layers[0].keys)
    del model
    gc.collect()
    assert keys() is None


def test_an_adapter_answers_as_itself_and_switched_off_as_its_base(talkative):
    base = load_model(talkative, FP32).eval()
    expected = theirs(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                            init_lora_weights=False)).eval()
    assert not decoding.unknown(model)
    tuned = ours(model)
    assert tuned == theirs(model) != expected
    on = decoders.state_of(model)
    with model.disable_adapter():
        assert ours(model) == expected
        assert decoders.state_of(model) != on, "what was captured with the adapter is not replayed without it"
    assert decoders.state_of(model) == on
    assert ours(model) == tuned


@pytest.mark.parametrize("chosen", [
    dict(temperature=0.7), dict(temperature=1.5, top_k=7), dict(temperature=1.2, top_p=0.8),
    dict(top_k=20, top_p=0.9, repetition_penalty=1.3), dict(temperature=0.0, repetition_penalty=1e6),
    dict(temperature=1.1, min_p=0.002),
], ids=str)
def test_a_seed_draws_what_generate_draws(model, chosen):
    model.generation_config.min_p = chosen.get("min_p")  # which is no option
    arguments = sampling_arguments(model, chosen)
    assert arguments.get("min_p") == chosen.get("min_p") and not decoding.unknown(model)
    torch.manual_seed(3)
    expected = theirs(model, arguments=arguments)
    torch.manual_seed(3)
    assert ours(model, arguments=arguments) == expected


def test_padding_is_no_text_that_a_penalty_is_about(model, chat, on_cpu, monkeypatch):
    """Where the tokenizer has no token to pad with, the one that ends an answer stands there."""
    monkeypatch.setattr(chat.tokenizer, "_pad_token", None, raising=False)
    chat.tokenizer.pad_token = None
    arguments = sampling_arguments(model, {"temperature": 0.0, "repetition_penalty": 1.3})
    prompts = [[40 + n] * (1 + 7 * n) for n in range(6)]
    monkeypatch.setattr(decoding, "pays", lambda model: False)
    expected = continuations(model, chat, prompts, 20, arguments)
    monkeypatch.setattr(decoding, "pays", lambda model: True)
    assert continuations(model, chat, prompts, 20, arguments) == expected
    masked = decoding.chooser(arguments, torch.tensor([[0, 0, 1], [1, 1, 1]]))
    ids, logits = torch.tensor([[5, 5, 6], [5, 5, 6]]), torch.zeros(2, 8)
    logits[:, 5], logits[:, 7] = 1.0, 0.9
    assert masked(ids, logits).tolist() == [5, 7]


@pytest.mark.parametrize("chosen", [dict(temperature=0.0), dict(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.3)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_are_replayed_write_what_generate_writes(family, tmp_path, monkeypatch, chosen):
    """Past the windows, into the next turn, and where the conversation is taken back."""
    install(monkeypatch)
    model = make_family(family, tmp_path)
    arguments, turn = sampling_arguments(model, chosen), list(range(40, 75))
    for new in ([50, 61, 72], [90] * 9, [33] * 30):
        answers = []
        for answer in (theirs, ours):
            torch.manual_seed(3)
            answers.append(answer(model, [turn], stops=(), arguments=arguments, **({"capture": True} if answer is ours else {})))
        assert answers[0] == answers[1]
        turn = [*turn, *answers[0][0], *new]
    assert Graph.replays > 60 and model not in decoders._given_up, decoders._given_up.get(model)


# --- what it does not know, and what fails ------------------------------------------------------------------------


def test_what_it_does_not_know_is_left_to_generate(model):
    model.generation_config.no_repeat_ngram_size = 3
    assert "no_repeat_ngram_size" in decoding.unknown(model)
    model.generation_config.no_repeat_ngram_size = None
    assert not decoding.unknown(model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in decoding.unknown(model)
    model.config.layer_types = ["chunked_attention"] * 2  # of which this configuration has no size
    assert "without kinds of layers" in decoding.unknown(model)
    assert not decoding.pays(model), "on a CPU generate is faster"


def spoil(model, step, what=float("nan")):
    """Spoil the logits of one step of the model, counted from 1, in its last row."""
    original, calls = model.lm_head.forward, itertools.count(1)

    def forward(states):
        logits = original(states)
        if next(calls) == step:
            logits[-1, -1, 5] = what
        return logits

    model.lm_head.forward = forward


@pytest.mark.parametrize("arguments", [GREEDY, dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)],
                         ids=["greedy", "sampling"])
@pytest.mark.parametrize("step", [1, 4])
def test_no_token_made_of_logits_that_are_not_finite_is_given_out(model, arguments, step):
    spoil(model, step)
    given = []
    with torch.inference_mode(), pytest.raises(UserError, match="is not finite, though its weights are"):
        given.extend(decoding.decoded(model, *batch(), stop_ids=[], pad=0, limit=9, arguments=arguments, every=1))
    assert model not in decoders._given_up, "the model is to blame, and generate would say the same"


def test_an_answer_that_fails_here_is_made_by_generate(model, chat, on_cpu, monkeypatch):
    expected = greedy_continuations(model, chat, PROMPTS, 12)
    monkeypatch.setattr(decoders.Decoder, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
    assert greedy_continuations(model, chat, PROMPTS, 12) == expected
    assert "out of memory" in decoders._given_up[model]
    assert model not in decoders._kept
    assert not decoding.pays(model)


def test_a_stream_that_fails_goes_on_where_it_was(model, chat, on_cpu, monkeypatch):
    question = [{"role": "user", "content": "a"}]
    plain = Stream(model, chat, question, 12, GREEDY)
    expected = "".join(plain)
    step, calls = decoders.Decoder.step, itertools.count()

    def fails(self, *args):
        if next(calls) == 5:
            raise RuntimeError("the cache is of another kind")
        step(self, *args)

    monkeypatch.setattr(decoders.Decoder, "step", fails)
    stream = Stream(model, chat, question, 12, GREEDY)
    assert "".join(stream) == expected
    assert stream.finish() == plain.finish()
    assert model in decoders._given_up


def test_what_cannot_be_captured_goes_on_uncaptured(model, on_cpu, monkeypatch):
    """Here there is no CUDA at all, so the capture fails after the first tokens."""
    assert ours(model, capture=True) == theirs(model)
    assert "cannot be captured" in decoders._given_up[model]
    assert not decoding.pays(model)


def test_a_capture_that_is_broken_off_leaves_nothing_behind(model, monkeypatch):
    captures, usable = install(monkeypatch), decoders.Decoder._usable
    monkeypatch.setattr(decoders.Decoder, "_usable", lambda self, logits: usable(self, logits + 0 * logits.sum().item()))
    assert ours(model, capture=True) == theirs(model)
    assert "when stream is capturing" in decoders._given_up[model] and not Graph.replays
    torch.cuda.empty_cache()
    assert not captures.underway and not sum(captures.pools.values())


def loaded(family: str, folder, device: str, dtype: torch.dtype):
    make_family(family, folder)
    return load_model(folder, Placement(device, dtype, "test")).eval()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma4-small", "gemma4-experts"])
def test_a_step_needs_no_number_and_nothing_of_the_cpu(family, tmp_path):
    """What is captured on a GPU: the step that chooses the best token, and the one whose logits are drawn from."""
    model = loaded(family, tmp_path, "cpu", torch.bfloat16).to(THERE)
    with torch.inference_mode(False), torch.no_grad(), computing_there() as operations:
        decoder = decoders.Decoder(model, 2, 64)
        ids = there((2, 9), torch.long)
        decoder.begin(model, ids, torch.ones_like(ids), frozenset((1,)), 0, None, 7, 0)
        operations.elsewhere.clear()
        for step in (decoder._greedy_step, decoder._logits):
            assert step(model).shape[0] == 2
        drawing = sampling_arguments(model, dict(temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.1))
        decoder.step(model, decoding.chooser(drawing, torch.ones_like(ids)), False)
    assert not operations.elsewhere and len(operations.names) > 200
    assert not any("multinomial" in name for name in operations.names), "on CUDA it is waited for"


def test_experts_whose_products_would_wait_are_taken_token_by_token(tmp_path, monkeypatch):
    """As in fp32, and on a GPU without a kernel for them."""
    model = loaded("gemma4-experts", tmp_path, "cpu", torch.float32)
    expected = theirs(model, PROMPTS[:1])
    monkeypatch.setattr(routing, "grouped_products_wait", lambda device, dtype: True)
    with Operations() as operations:
        assert ours(model, PROMPTS[:1]) == expected
    layers = sum(type(module).__name__ == "Gemma4TextExperts" for module in model.modules())
    assert sum("grouped_mm" in name for name in operations.names) == 2 * layers > 0, "of the prompt alone"
    assert model.config.get_text_config()._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(("dtype", "capability", "waits"), [
    (torch.bfloat16, (9, 0), False), (torch.bfloat16, (10, 0), False), (torch.float32, (9, 0), True), (torch.bfloat16, (8, 0), True),
    (torch.bfloat16, (12, 0), True)])
def test_which_products_by_expert_wait(monkeypatch, dtype, capability, waits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped_products_wait(torch.device("cuda"), dtype) == waits
    assert not grouped_products_wait(torch.device("cpu"), dtype)


# --- on a GPU -----------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def on_gpu(talkative):
    """In fp32, where the captured step computes what the other one does."""
    return load_model(talkative, Placement("cuda", torch.float32, "test")).eval()


@gpu
@pytest.mark.parametrize("chosen", [dict(temperature=0.0), dict(temperature=0.0, repetition_penalty=1e6),
                                    dict(temperature=0.9, top_k=20, top_p=0.9)], ids=str)
def test_captured_ids_are_those_made_without(on_gpu, chosen):
    arguments = sampling_arguments(on_gpu, chosen)
    made = []
    for capture in (False, True, True):
        torch.manual_seed(3)
        made.append(ours(on_gpu, limit=100, arguments=arguments, capture=capture))
    assert made[0] == made[1] == made[2]
    assert on_gpu not in decoders._given_up, decoders._given_up.get(on_gpu)
    [decoder] = decoders._kept[on_gpu]
    assert decoder.replays


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_ids_of_every_gemma(family, tmp_path):
    model = loaded(family, tmp_path, "cuda", torch.float32)
    prompts = PROMPTS[:1] if family == "gemma4-experts" else PROMPTS  # of more its products wait in fp32
    assert ours(model, prompts, limit=40, capture=False) == ours(model, prompts, limit=40)
    assert decoders._kept[model][-1].replays and model not in decoders._given_up, decoders._given_up.get(model)


@gpu
def test_a_captured_answer_outgrows_its_cache(on_gpu, monkeypatch):
    monkeypatch.setattr(decoders, "SMALLEST", 16)
    monkeypatch.setattr(decoding, "ROOM", 4)
    expected = ours(on_gpu, limit=90, capture=False)
    decoders._kept.pop(on_gpu)  # else it would begin with a cache that has the room
    assert ours(on_gpu, limit=90) == expected


@gpu
def test_the_second_turn_replays_what_the_first_captured(on_gpu, chat, monkeypatch):
    captures = []
    capture = decoders.Decoder._capture
    monkeypatch.setattr(decoders.Decoder, "_capture", lambda self, model: (captures.append(1), capture(self, model)))
    texts = []
    for text in ("a", "seven wizards box quietly", "a"):
        stream = Stream(on_gpu, chat, [{"role": "user", "content": text}], 60, GREEDY)
        texts.append("".join(stream))
        stream.finish()
    assert texts[0] == texts[2] != texts[1]
    assert captures == [1]


@gpu
def test_an_adapter_that_is_switched_off_is_captured_apart(on_gpu):
    expected = ours(on_gpu)
    model = get_peft_model(on_gpu, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
                                              init_lora_weights=False)).eval()
    tuned = ours(model)
    with model.disable_adapter():
        assert ours(model) == expected != tuned
    assert ours(model) == tuned
    [decoder] = decoders._kept[model]
    assert len(decoder._captured) == 2


@gpu
def test_a_captured_stream_can_be_stopped(on_gpu, chat):
    stream = Stream(on_gpu, chat, [{"role": "user", "content": "a"}], 900, GREEDY)
    for n, _ in enumerate(stream):
        if n == 10:
            stream.stop()
    answer = stream.finish()
    assert 10 < answer.tokens < 900 and not answer.ended


@gpu
def test_logits_of_a_captured_step_that_are_not_finite_are_an_error(on_gpu, chat):
    stream = Stream(on_gpu, chat, [{"role": "user", "content": "a"}], 900, GREEDY)
    with pytest.raises(UserError, match="holds infinities or no numbers"):
        for n, _ in enumerate(stream):
            if n == 10:
                with torch.no_grad():
                    on_gpu.lm_head.weight[7] = float("nan")
        stream.finish()
