"""Questions with pictures are answered as transformers' own ``generate`` answers them with the pictures themselves."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from gemma_tune.answers import decoders, decoding, generation
from gemma_tune.answers.generation import BROKEN, answer_of, greedy_continuations, prompt_ids
from gemma_tune.answers.kept import KeptTurns
from gemma_tune.answers.prompts import Prompt
from gemma_tune.answers.sight import beside, see
from gemma_tune.answers.stream import Stream
from gemma_tune.base.checkpoint import read_config
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from support import seers
from support.seers import asked, write_pictures

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
TOKENS = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


class Case:
    """A family's model, with its towers and without them."""

    def __init__(self, name: str, folder: Path, pictures: Path):
        seers.make(name, folder)
        self.placement = choose_placement("fp32")
        self.chat = load_format(folder, read_config(folder)["model_type"])
        self.chat.eye.folder = pictures
        self.whole = load_model(folder, self.placement, sight="towers").eval()
        self.model = load_model(folder, self.placement, sight="features").eval()
        self.seen = {name: see(self.whole, self.chat.eye, name) for name in ("0.png", "1.png", "2.png")}

    def said(self, ids: list[int]) -> str:
        return self.chat.said(self.chat.decoded(ids)).rstrip(BROKEN)

    def theirs(self, turns: list[dict]) -> list[int]:
        """What ``generate`` writes with the pixels, up to where the answer ends."""
        return self.generated(turns)[0]

    def generated(self, turns: list[dict]) -> tuple[list[int], torch.Tensor]:
        """The same, and its logits."""
        ids, eye, names = torch.tensor([prompt_ids(self.chat, turns)]), self.chat.eye, Prompt(turns).pictures
        inputs = [eye.inputs(name) for name in names]
        if inputs and "image_sizes" in inputs[0]:  # Mistral's are filled up to the largest of a batch
            high, wide = (max(each["pixel_values"].shape[n] for each in inputs) for n in (2, 3))
            for each in inputs:
                pixels = each["pixel_values"]
                each["pixel_values"] = torch.nn.functional.pad(pixels, (0, wide - pixels.shape[3], 0, high - pixels.shape[2]))
        shown = {key: torch.cat([each[key] for each in inputs]) for key in
                 ("pixel_values", "image_position_ids", "image_grid_thw", "image_sizes") if inputs and key in inputs[0]}
        marks = {eye.marks: (ids == eye.soft_id).long()} if eye.marks and names else {}
        with torch.no_grad():
            out = self.whole.generate(return_dict_in_generate=True, output_logits=True, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
                                      eos_token_id=self.chat.stop_ids, pad_token_id=self.chat.stop_ids[0], **shown, **marks, **GREEDY)
        written = out.sequences[0, ids.shape[1]:].tolist()
        return list(itertools.takewhile(lambda token: token not in self.chat.stop_ids, written)), torch.cat(out.logits)


@pytest.fixture(scope="module")
def case(tmp_path_factory, pictures):
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp("seers") / name, pictures))


@pytest.fixture
def logits(monkeypatch) -> list[torch.Tensor]:
    """Those of the answers that :func:`answer` makes, token by token."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(generation, "refuse_not_finite", lambda scores, model: found.append(scores.clone()))
    return found


def answer(case: Case, kept: KeptTurns | None, turns: list[dict]) -> list[int]:
    """Of the model without towers, as a chat asks it."""
    stream = Stream(case.model, case.chat, turns, TOKENS, GREEDY, kept=kept, seen=case.seen)
    stream.finish()
    return stream._pieces.ids


def as_theirs(case: Case, kept: KeptTurns, turns: list[dict], logits: list[torch.Tensor]) -> list[int]:
    """The answer, once it and its logits are those of ``generate``."""
    logits.clear()
    found, (expected, scores) = answer(case, kept, turns), case.generated(turns)
    assert found == expected
    torch.testing.assert_close(torch.cat(logits), scores, rtol=1e-4, atol=1e-4)
    return found


def differ(case: Case, one: list[dict], other: list[dict]) -> bool:
    """Whether the first token of answers is likelier to one than to the other, which what is alike here does not hide."""
    return not torch.allclose(case.generated(one)[1][0], case.generated(other)[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", seers.FAMILIES)
def test_prompts_with_and_without_pictures_in_a_batch(case, family):
    case = case(family)
    rows = [[asked("what is it", "0.png", "2.png")], [asked("hello there, wizards")], [asked("one", "1.png")]]
    names = [Prompt(row).pictures for row in rows]
    assert names == [("0.png", "2.png"), (), ("1.png",)]
    found = greedy_continuations(case.model, case.chat, [prompt_ids(case.chat, row) for row in rows], TOKENS,
                                 pictures=names, seen=case.seen)
    assert [one.text for one in found] == [answer_of(case.chat, case.theirs(row)).text for row in rows]


@pytest.mark.parametrize("family", seers.FAMILIES)
def test_a_conversation_shows_pictures_and_talks_about_them(case, family, logits):
    """Each turn as from its beginning, also where a turn is taken back and asked with another picture."""
    case, kept, turns, reused = case(family), KeptTurns(), [], []
    for question in (asked("hello"), asked("see", "1.png"), asked("and"), asked("this", "2.png")):
        turns = [*turns, question]
        found = as_theirs(case, kept, turns, logits)
        reused.append(kept.reused)
        turns = [*turns, {"role": "assistant", "content": case.said(found).strip() or "nothing"}]
    assert reused[2] > 17 or family == "qwen3.5", "whose layers cannot be cut"
    other = [*turns[:2], asked("see", "0.png"), *turns[3:5]]
    as_theirs(case, kept, other, logits)
    assert differ(case, other, turns[:5]), "the picture matters"


def test_a_picture_of_the_same_size_is_another_one(case, logits):
    case, kept = case("gemma3"), KeptTurns()
    first, other = ([asked("see", name), {"role": "assistant", "content": "so"}, asked("and")] for name in ("0.png", "1.png"))
    ids = prompt_ids(case.chat, first)
    assert ids == prompt_ids(case.chat, other) and differ(case, first, other)
    as_theirs(case, kept, first, logits)
    as_theirs(case, kept, other, logits)
    assert kept.reused == ids.index(case.chat.eye.soft_id)
    as_theirs(case, kept, other, logits)
    assert kept.reused == len(ids) - 1


@pytest.mark.parametrize("family", ["qwen3-vl", "gemma4-large"])
def test_another_conversation_in_between_changes_nothing(case, family, logits):
    """Qwens remember how far a prompt's pictures moved what follows."""
    case, one, other = case(family), KeptTurns(), KeptTurns()
    shown, plain = [asked("see", "1.png", "2.png")], [asked("no picture")]
    for _ in range(3):
        for kept, turns in ((one, shown), (other, plain)):
            found = as_theirs(case, kept, turns, logits)
            turns += [{"role": "assistant", "content": case.said(found).strip() or "nothing"}, asked("and then")]
    assert one.reused and other.reused


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "gemma4-small", "gemma4-large"])
def test_a_cache_of_fixed_size_reads_pictures(case, family):
    """What a GPU captures, whose first step alone has to do with pictures."""
    case, eye = case(family), case(family).chat.eye
    rows = [[asked("what is it", "0.png", "2.png")], [asked("hello there, wizards")], [asked("one", "1.png")]]
    encoded = [prompt_ids(case.chat, row) for row in rows]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(one)) + one for one in encoded])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in encoded])
    shown = beside(case.seen, eye, ids, [Prompt(row).pictures for row in rows])
    assert not decoding.unknown(case.model)
    with torch.inference_mode():
        groups = list(decoding.decoded(case.model, ids, mask, stop_ids=case.chat.stop_ids, pad=0, limit=TOKENS, arguments=GREEDY,
                                       every=4, capture=False, beside=lambda read: shown))
        assert groups and case.model not in decoders._given_up
        for n, row in enumerate(rows):
            written = [token for group in groups for token in group[n]]
            expected = case.theirs(row)
            assert written[:len(expected)] == expected


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "gemma4-small", "gemma4-large"])
def test_such_a_cache_keeps_pictures_from_turn_to_turn(case, family, monkeypatch):
    case, turns, read = case(family), [], []
    monkeypatch.setattr(decoding, "pays", lambda model: True)
    taken = decoding.take
    monkeypatch.setattr(decoding, "take", lambda *args: read.append(found := taken(*args)) or found)
    for question in (asked("see", "1.png"), asked("and"), asked("this", "2.png"), asked("so?")):
        turns = [*turns, question]
        found = answer(case, None, turns)
        assert found == case.theirs(turns)
        turns = [*turns, {"role": "assistant", "content": case.said(found).strip() or "nothing"}]
    assert len(read) == 4 and case.model not in decoders._given_up
    assert read[0][1] == 0 < read[3][1], "most of a prompt has been read before"
    other = [asked("see", "0.png"), *turns[1:3]]
    assert answer(case, None, other) == case.theirs(other)
    assert read[-1][1] < prompt_ids(case.chat, other).index(case.chat.eye.soft_id) + 1, "another picture is read"


def test_a_batch_of_one_reads_its_own_picture(case, monkeypatch):
    """Though the ids are those that were read with another one before."""
    case, turns = case("gemma3"), [[asked("what is it here", name)] for name in ("0.png", "2.png", "2.png")]
    monkeypatch.setattr(decoding, "pays", lambda model: True)
    logits = []
    usable = decoders.Decoder._usable
    monkeypatch.setattr(decoders.Decoder, "_usable", lambda self, scores: logits.append(scores.clone()) or usable(self, scores))
    for one in turns:
        logits.clear()
        greedy_continuations(case.model, case.chat, [prompt_ids(case.chat, one)], TOKENS, pictures=[Prompt(one).pictures], seen=case.seen)
        expected = case.generated(one)[1]
        torch.testing.assert_close(torch.cat(logits[:len(expected)]), expected, rtol=1e-4, atol=1e-4)
    assert case.model not in decoders._given_up and differ(case, *turns[:2])


def test_where_tokens_are_reckoned_from_pictures_generate_answers(case, monkeypatch):
    monkeypatch.setattr(decoding, "pays", lambda model: True)
    asked_here = []
    monkeypatch.setattr(decoding, "decoded", lambda *_, **__: asked_here.append(1) or (group for group in [[[1]]]))
    for family, expected in (("qwen3-vl", 0), ("gemma3", 1)):
        answer(case(family), None, [asked("what", "1.png")])
        greedy_continuations(case(family).model, case(family).chat, [prompt_ids(case(family).chat, [asked("what", "1.png")])], 2,
                             pictures=[["1.png"]], seen=case(family).seen)
        assert len(asked_here) == 2 * expected
