"""Which writing system a text is in, told from its first letters."""

from __future__ import annotations

from functools import cache

import numpy as np

# Index in here = code in an array of scripts.
SCRIPTS = ("Latin", "Han", "Cyrillic", "Arabic", "Hangul", "Kana", "Devanagari", "other", "no letters")
OTHER, NO_LETTERS = SCRIPTS.index("other"), SCRIPTS.index("no letters")
HAN, KANA = SCRIPTS.index("Han"), SCRIPTS.index("Kana")
LOOKED_AT = 800  # characters: about 500 letters of most texts

_RANGES = {
    "Latin": ((0x41, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xAB30, 0xAB6F), (0xFF21, 0xFF5A)),
    "Han": ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    "Cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFC)),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
}
_ABOVE = 0x10000  # one entry for the rare characters above the basic plane, most of which are Han


@cache
def _table() -> np.ndarray:
    """Script of each letter of the basic plane; ``NO_LETTERS`` for everything that is no letter."""
    table = np.full(_ABOVE + 1, NO_LETTERS, dtype=np.uint8)
    table[[n for n in range(0x80, _ABOVE) if chr(n).isalpha()]] = OTHER
    for name, ranges in _RANGES.items():
        for first, last in ranges:
            table[[n for n in range(first, last + 1) if chr(n).isalpha()]] = SCRIPTS.index(name)
    return table


def script_of(text: str) -> int:
    """The writing system of most of a text's first letters, as an index of ``SCRIPTS``.

    Japanese counts as Kana where a tenth of its letters are, although more of them may be Han.
    """
    text = text[:LOOKED_AT]
    if text.isascii():
        return SCRIPTS.index("Latin") if any(map(str.isalpha, text)) else NO_LETTERS
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    scripts = _table()[np.minimum(codes, _ABOVE)]
    above = codes[codes >= _ABOVE]
    counts = np.bincount(scripts, minlength=len(SCRIPTS))[:NO_LETTERS]
    counts[HAN] += np.count_nonzero((above >= 0x20000) & (above < 0x40000))
    if counts[KANA] * 10 >= counts[HAN] + counts[KANA]:
        counts[KANA] += counts[HAN]
        counts[HAN] = 0
    return int(counts.argmax()) if counts.any() else NO_LETTERS
