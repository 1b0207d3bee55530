"""Regular expressions in an adapter's settings, which PEFT matches with the names of a model's layers.

Python cannot stop a search that it has begun, and some patterns take longer than the universe has. So those that repeat
something are tried in a process that can be stopped, with the same names, before anything else matches them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError

SECONDS = 5.0
_REPEATS = re.compile(r"[*+{]")
_LONGEST = 2000  # characters of a pattern
_TRY = """
import json, re, sys
names, patterns = json.load(sys.stdin)
for pattern in patterns:
    print(flush=True)
    try:
        search = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        continue
    for name in names:
        search.match(name), search.fullmatch(name)
"""


def ending(pattern: str) -> str:
    """What PEFT makes of a key of ``rank_pattern`` or ``alpha_pattern``; its ``get_pattern_key`` does."""
    return rf"(.*\.)?({pattern})$"


def refuse_endless(folder: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse an adapter with a pattern whose search among these names does not end soon.

    Args:
        config: adapter_config.json.
        names: of the layers that the patterns will be matched with.

    Raises:
        UserError: with the setting and the pattern.
    """
    patterns = [(setting, own, whole) for setting, own, whole in _patterns(config) if _REPEATS.search(own)]
    if not patterns:
        return
    long = next((found for found in patterns if len(found[1]) > _LONGEST), None)
    tried = json.dumps([list(names), [whole for _, _, whole in patterns]])
    try:
        if not long:
            subprocess.run([sys.executable, "-I", "-S", "-c", _TRY], input=tried.encode(), capture_output=True,
                           timeout=SECONDS)
            return
    except subprocess.TimeoutExpired as e:
        long = patterns[max(0, (e.stdout or b"").count(b"\n") - 1)]
    setting, own, _ = long
    raise UserError(f"{folder}: the search for {setting} {own[:80]!r} among the names of the layers does not end",
                    "write the pattern in adapter_config.json without repetitions within repetitions, or the names of "
                    "the layers as a list")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Setting, pattern, and what PEFT makes of it."""
    for setting in ("target_modules", "exclude_modules"):
        if isinstance(own := config.get(setting), str):
            yield setting, own, own
    layers = config.get("layers_pattern")
    for own in [layers] if isinstance(layers, str) else layers if isinstance(layers, list) else []:
        if isinstance(own, str):
            yield "layers_pattern", own, rf".*\.{own}\.(\d+)\."
    for setting in ("rank_pattern", "alpha_pattern"):
        if isinstance(found := config.get(setting), dict):
            yield from ((setting, own, ending(own)) for own in found)
