"""What stands around the turns of a chat template, read off renderings of marker words."""

from __future__ import annotations

import re
from dataclasses import replace

from jinja2 import TemplateError

from gemma_tune.ollama.probe import (
    EOS,
    FIRST,
    REPLY,
    SECOND,
    SYSTEM,
    Jinja,
    Messages,
    Unlike,
    split,
    talk,
    without,
)
from gemma_tune.ollama.turns import Turns

_NOT_LIKE_THE_FIRST = "later user turns are not written like the first"
_MARK_AT_END = re.compile(r"<[^<>\s]+>\s*\Z")


def read_turns(jinja: Jinja) -> Turns:
    """Takes the surroundings from renderings of marker words.

    Raises:
        Unlike: a marker is missing, or what stands around it changes with its place.
    """
    lead, first_end = split(jinja(talk(FIRST)), FIRST)
    _, to_reply, to_second, _ = split(jinja(talk(FIRST, REPLY, SECOND)), FIRST, REPLY, SECOND)
    user_after = _turn_end(jinja, talk(FIRST), first_end)
    reply_after = _turn_end(jinja, talk(FIRST, REPLY), to_second)
    user_before = without(to_second, reply_after)
    opening, first = _start(lead, user_before)
    place = _system_place(jinja, user_before)
    if first and ("fold" not in place or not jinja.knows_system):
        raise Unlike(_NOT_LIKE_THE_FIRST)
    turns = Turns(
        user=(user_before, user_after),
        assistant=(without(to_reply, user_after), reply_after),
        prompt=without(first_end, user_after),
        opening=opening,
        first=first,
        trims=frozenset(role for role in ("user", "assistant", "system") if _trims(jinja, role)),
        **place,
    )
    text = repr(turns)
    if any(bos in text for bos in jinja.all_bos):
        raise Unlike("it prints BOS between turns, while Ollama has one at the start")
    if jinja.eos_token == EOS and EOS in text:
        raise Unlike("it prints eos_token, which was not given")
    turns = _with_default_system(turns)
    if not jinja.knows_system:
        return turns
    if turns.fold:
        turns = _nearer(jinja, turns, talk(f" {FIRST} ", system=f" {SYSTEM} "), fold_whole=True)
    return _nearer(jinja, turns, talk(FIRST, system=""), skips_empty=True)


def _nearer(jinja: Jinja, turns: Turns, messages: Messages, **change: bool) -> Turns:
    """The turns with a change, where only that makes a conversation the template's."""
    changed = replace(turns, **change)
    return changed if changed.render(messages) == jinja(messages) != turns.render(messages) else turns


def _start(lead: str, user_before: str) -> tuple[str, str]:
    """What stands before the first user's turn, or else inside of it before its text.

    Raises:
        Unlike: that cannot be told.
    """
    # With nothing before a user's turn, what stands before the first one would not be known from an opening.
    if user_before or not lead:
        if lead.endswith(user_before):
            return lead.removesuffix(user_before), ""
        if lead.startswith(user_before):
            return "", lead.removeprefix(user_before)
    raise Unlike(_NOT_LIKE_THE_FIRST)


def _turn_end(jinja: Jinja, messages: Messages, followed: str) -> str:
    """What ends the last message; some templates add EOS where no answer is asked for, and Hunyuan's a mark of its own,
    which are no part of the turn."""
    whole = end = split(jinja(messages, generation=False), messages[-1]["content"])[1]
    while not followed.startswith(end) and _MARK_AT_END.search(end):
        end = _MARK_AT_END.sub("", end)
    return end if followed.startswith(end) else whole.removesuffix(jinja.eos_token)


def _system_place(jinja: Jinja, user_before: str) -> dict:
    if not jinja.knows_system:
        return {"fold": ("", "\n\n"), "fold_first": True, "fold_whole": True}
    before, after, _ = split(jinja(talk(FIRST, system=SYSTEM)), SYSTEM, FIRST)
    if after.endswith(user_before):
        around = before, after.removesuffix(user_before)
        later = _later_system(jinja, user_before)
        return {"system": around, "later_system": None if later == around else later}
    fold = without(before, user_before), after
    later = split(jinja(talk(FIRST, REPLY, SECOND, system=SYSTEM)), FIRST, SECOND)[0]
    return {"fold": fold, "fold_last": SYSTEM not in later}


def _later_system(jinja: Jinja, user_before: str) -> tuple[str, str] | None:
    """What stands around a system message between other turns; None where the template takes none there."""
    first, reply, second = talk(FIRST, REPLY, SECOND)
    try:
        plain = split(jinja([first, reply, second]), REPLY, SECOND)[1].removesuffix(user_before)
        _, text, after, _ = split(jinja([first, reply, *talk(SECOND, system=SYSTEM)]), REPLY, SYSTEM, SECOND)
        return without(text, plain), after.removesuffix(user_before)
    except (Unlike, TemplateError):
        return None


def _trims(jinja: Jinja, role: str) -> bool:
    """Whether white space around a message of this role is dropped; partly dropped counts as kept (see `_compare`)."""
    if role == "system" and not jinja.knows_system:
        return False
    plain = talk(FIRST, REPLY, SECOND, system=SYSTEM if role == "system" else None)
    # Of the user's turns it is the later one, since what stands inside the first one can keep white space there.
    padded = [{**m, "content": f" \n{m['content']}\u3000\n"} if m["role"] == role and m["content"] != FIRST else m
              for m in plain]
    return jinja(padded) == jinja(plain)


def _with_default_system(turns: Turns) -> Turns:
    """A system text that is written where a conversation has none is a default one, which Ollama keeps in SYSTEM."""
    for place, around in (("opening", turns.system), ("first", turns.fold)):
        text, (before, after) = getattr(turns, place), around or ("", "")
        inner = text[len(before) : len(text) - len(after)]
        if around and inner and text == inner.join(around):
            return replace(turns, **{place: ""}, default_system=inner)
    return turns
