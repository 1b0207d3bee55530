"""The last number in a text, by its value, as people and models write numbers."""

from __future__ import annotations

import unicodedata
from fractions import Fraction

import regex

_LONGEST = 1000  # digits of one that is read as such
_LETTER = r"\p{Lu}\p{Ll}\p{Lt}"  # of scripts with capitals: in Chinese a number stands directly behind a word
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# Full-width signs and minus signs. Not NFKC, which also makes a digit of what is raised: m² is no 2.
_AS_ASCII = str.maketrans("０１２３４５６７８９，．－−⁄", "0123456789,.--/")
_EXPONENT = regex.compile(r"(?<=\d)[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
# Exponents and indices of units and variables, which are no numbers: m^2, s^{-1}, x_1.
_OF_A_NAME = regex.compile(rf"(?:(?<=[\p{{L}})\]}}])\^|(?<=[{_LETTER})\]}}])_)(?:\{{[^{{}}]{{0,50}}\}}|-?\w+)")
_NUMBER = regex.compile(rf"""
    (?: (?<![{_LETTER}\d_)\]}}%]) (?P<sign>-) (?:\\?\p{{Sc}}[ ]?)? )?    # 3-5 has no minus, -$5 has one
    (?<! [{_LETTER}\d] ) (?<! [{_LETTER}]\d+[.,] )                       # CO2, v1.5
    (?:
        (?P<whole>\d++)?[ ]?(?P<share>[¼-¾⅐-⅞])
    |   (?P<whole>\d++)?[ ]?\\[dt]?frac\{{(?P<over>-?\d+)\}}\{{(?P<under>\d+)\}}
    |   (?P<whole>\d++)[ ](?P<over>\d++)/(?P<under>\d++)
    |   (?P<number> [1-9]\d{{0,2}}+ (?P<group>[, \u00a0\u2009\u202f])\d{{3}} (?:(?P=group)\d{{3}})*+ (?!\d) (?:\.\d++)?
        |   (?<!\d,) \d++,\d++ (?!,\d)
        |   \d++(?:\.\d++)?
        |   \.\d++ )
        (?: /(?P<under>\d++(?:\.\d++)?)
        |   [eE](?P<tens>[-+]?\d++) (?! [{_LETTER}] | \.\d )
        |   [ ]?(?:[×x*·⋅]|\\times|\\cdot)[ ]?10\^(?:\{{(?P<tens>[-+]?\d++)\}}|(?P<tens>[-+]?\d++))
        |   \^(?:\{{(?P<power>[-+]?\d++)\}}|(?P<power>[-+]?\d++(?:\.\d++)?)) )?
    )""", regex.VERBOSE)


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text; None where there is none, or only one divided by zero or too long.

    A comma or a blank stands before each three digits; any other comma before decimals.

    >>> last_number("so 1,200 - 3 = 1,197."), last_number("about 3/4"), last_number("minus -0.50"), last_number("no")
    (Fraction(1197, 1), Fraction(3, 4), Fraction(-1, 2), None)
    """
    text = text.replace("{,}", ",")  # LaTeX's comma without a space behind it
    text = _EXPONENT.sub(lambda found: f"^{found[0].translate(_RAISED)}", text.translate(_AS_ASCII))
    found = list(_NUMBER.finditer(_OF_A_NAME.sub("", text)))
    if not found or len((last := found[-1])[0]) > _LONGEST:
        return None
    try:
        value = _value(last.groupdict())
    except (ZeroDivisionError, OverflowError):
        return None
    return -value if last["sign"] else value


def _value(of: dict[str, str | None]) -> Fraction:
    """Of the parts of one, without its sign.

    Raises:
        ZeroDivisionError: divided by zero.
        OverflowError: too long.
    """
    if of["share"]:
        return int(of["whole"] or 0) + Fraction(unicodedata.numeric(of["share"])).limit_denominator(10)
    if of["over"]:
        return int(of["whole"] or 0) + Fraction(int(of["over"]), int(of["under"]))
    digits = of["number"].replace(of["group"], "") if of["group"] else of["number"].replace(",", ".")
    value = Fraction(digits)
    if of["under"]:
        return value / Fraction(of["under"])
    if of["tens"]:
        return value * Fraction(10) ** _bounded(of["tens"], 1)
    return value ** _bounded(of["power"], len(digits)) if of["power"] else value


def _bounded(exponent: str, digits: int) -> int:
    """An exponent that makes no more than so many digits of a base with these."""
    value = Fraction(exponent)
    if value.denominator > 1 or abs(value) * digits > _LONGEST:
        raise OverflowError
    return int(value)
