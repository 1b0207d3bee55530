"""Batches of prompts of about the same length: what fills up a row is computed as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MOST_ROWS = 32
_SHARE = 0.25  # of the free memory that keys and values may take
_SPREAD = 64  # tokens that the longest prompt of a batch has more than the shortest


def by_length(lengths: Mapping[int, int], limit: int, context: int | None, most: Callable[[int], int],
              ) -> list[list[int]]:
    """Numbers of prompts in groups, the shortest prompts first.

    A group's longest prompt leaves each of the others as much room for its answer as it would have alone.

    Args:
        lengths: tokens of each prompt by its number.
        limit: most new tokens.
        context: of the model, in tokens; None where nobody says.
        most: rows that fit at a width in tokens, prompt and answer together.
    """
    groups: list[list[int]] = []
    for number in sorted(lengths, key=lambda n: (lengths[n], n)):
        length = lengths[number]
        group = groups[-1] if groups else []
        shortest = lengths[group[0]] if group else 0
        as_much_room = length == shortest or context is None or length + limit <= context
        together = group and as_much_room and length - shortest <= _SPREAD
        if together and len(group) < most(length + limit):
            group.append(number)
        else:
            groups.append([number])
    return groups


def rows_that_fit(model: Any, free: int) -> Callable[[int], int]:
    """How many rows of a width fit into a share of so many bytes, by the keys and values that they take."""
    a_token = keys_of_a_token(model.config.get_text_config()) * model.dtype.itemsize
    return lambda tokens: max(1, min(MOST_ROWS, int(_SHARE * free / max(1, a_token * tokens))))


def keys_of_a_token(text: Any) -> int:
    """Numbers of keys and values that all layers of a text model's configuration keep of a token."""
    # Gemma 4's layers of two kinds differ in their heads.
    of_a_kind = not getattr(text, "is_heterogeneous", False)
    layers = [text] * text.num_hidden_layers if of_a_kind else list(text.per_layer_config)
    return 2 * sum(map(_width_of_keys, layers))


def _width_of_keys(layer: Any) -> int:
    heads = getattr(layer, "num_key_value_heads", None) or getattr(layer, "num_attention_heads", 0)
    if not heads:  # a model with a state, whose size is the same at any width
        return 0
    return heads * (getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def read_before(known: Sequence[int | str], prompt: Sequence[int | str]) -> int:
    """How many tokens of a prompt need not be read again where ``known`` have been: those of its beginning that are the
    same. The last is always read: its logits are what the answer begins with."""
    most = min(len(known), len(prompt) - 1)
    return next((n for n, (one, other) in enumerate(zip(known[:most], prompt)) if one != other), most)
