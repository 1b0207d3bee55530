"""Keys and values of a conversation, kept between its turns, so that a turn reads only what is new of it.

The next prompt begins as the last one and its answer did, up to where the conversation was changed (``/undo``,
``/retry``, ``/fix``); there the cache is cut, and what stays is not computed again.

A layer with a sliding window forgets what lies behind the window, so it could not be cut: the positions that would be
in the window of an earlier place are gone. The layers here keep them as well, up to ``PAST`` of them, and show the
model its window alone. A cut that reaches further back drops everything, and the prompt is read anew: the logits are
those of a prompt that is read from its beginning, in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from gemma_tune.answers.decoders import base_of
from gemma_tune.answers.lengths import read_before

PAST = 4096  # positions that a sliding layer keeps behind its window: most conversations as a whole
_GROWTH = 256  # positions that a buffer grows by at least


class _Buffers:
    """Keys and values (rows, heads, positions, width) in buffers with room for more, as copying them takes time."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.used = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, most: int | None) -> None:
        """Add positions; of those before, at most ``most`` need to stay when room is made."""
        end = self.used + keys.shape[-2]
        if self.keys is None or end > self.keys.shape[-2]:
            stay = self.used if most is None else min(self.used, most)
            room = stay + keys.shape[-2] + max(_GROWTH, stay // 2)
            self.keys, self.values = (self._moved(old, like, stay, room)
                                      for old, like in ((self.keys, keys), (self.values, values)))
            self.used, end = stay, stay + keys.shape[-2]
        self.keys[:, :, self.used:end], self.values[:, :, self.used:end] = keys, values
        self.used = end

    def _moved(self, old: torch.Tensor | None, like: torch.Tensor, stay: int, room: int) -> torch.Tensor:
        new = like.new_empty((*like.shape[:2], room, like.shape[-1]))
        if old is not None and stay:
            new[:, :, :stay] = old[:, :, self.used - stay:self.used]
        return new

    def last(self, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The last positions, all of them without ``count``; views of the buffers."""
        begin = 0 if count is None else max(0, self.used - count)
        return self.keys[:, :, begin:self.used], self.values[:, :, begin:self.used]


class _Cut:
    """What takes the library's steps back as well: on Apple's GPU it makes one more than it needs, as it does not wait
    for the end of an answer there."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions, so many as the number is below 0."""
        if tokens_to_remove and self.is_initialized:
            self.cut(self.get_seq_length() + tokens_to_remove)


class _Growing(_Cut, DynamicLayer):
    """A layer that sees everything."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers = _Buffers()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any,
               **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._buffers.append(key_states, value_states, None)
        self.keys, self.values = self._buffers.last()
        return self.keys, self.values

    def cut(self, length: int) -> bool:
        """Forget what comes after the first ``length`` positions; False if that cannot be."""
        if self._buffers.used > length:
            self._buffers.used = length
            self.keys, self.values = self._buffers.last()
        return True


class _Sliding(_Cut, DynamicSlidingWindowLayer):
    """A layer that sees a window, and keeps what was in it before."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self._buffers = _Buffers()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any,
               **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        behind = self.sliding_window - 1  # what a position sees besides itself
        self._buffers.append(key_states, value_states, behind + PAST)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = self._buffers.last(behind)
        return self._buffers.last(behind + key_states.shape[-2])

    def cut(self, length: int) -> bool:
        """As of :class:`_Growing`; False if positions are gone that the window at ``length`` shows."""
        back = self.cumulative_length - length
        if back <= 0:
            return True
        first = self.cumulative_length - self._buffers.used  # the earliest position that is still here
        if first > max(0, length - self.sliding_window + 1):
            return False
        self._buffers.used -= back
        self.cumulative_length = length
        self.keys, self.values = self._buffers.last(self.sliding_window - 1)
        return True


class KeptTurns:
    """What a model has read and written in a conversation, as token ids with their keys and values.

    In the place of the ids of pictures stand names, see ``sight.told_apart``.

    For one model in one state: what an adapter has computed is of no use without it.
    """

    def __init__(self) -> None:
        self.ids: list[int | str] = []
        self.reused = 0  # positions of the last prompt that were not computed again
        self._cache: Any = None

    def cache_for(self, model: Any, ids: Sequence[int | str]) -> Any:
        """The cache to read a prompt with, cut back to where that begins to differ; to be followed by :meth:`keep`.

        None for a model with layers that cannot be cut, such as those with a recurrent state.
        """
        same = read_before(self.ids, ids)
        cache, self._cache, self.ids, self.reused = self._cache, None, [], 0  # what fails leaves nothing half done
        if cache is not None and same and all([_cut(layer, same) for layer in cache.layers]):
            self.reused = same
            return cache
        return _empty(model)

    def keep(self, cache: Any, ids: Sequence[int | str]) -> None:
        """Remember what was read and written; the last ids may not have been read yet."""
        if cache is not None:
            read = cache.get_seq_length()
            self._cache, self.ids = cache, list(ids[:read])


def _cut(layer: Any, length: int) -> bool:
    return True if isinstance(layer, DummyLayer) else layer.cut(length)


def _empty(model: Any) -> Cache | None:
    base = base_of(model)
    if getattr(base.generation_config, "use_cache", True) is False or not base._supports_default_dynamic_cache():
        return None
    try:
        kinds, settings = get_layer_types_and_kwargs(base.config.get_text_config(decoder=True))
    except Exception:  # noqa: BLE001 - a configuration of another shape: `generate` knows what to do
        return None
    known = {"full_attention": _Growing, "sliding_attention": _Sliding, "dummy": DummyLayer}
    if not kinds or not known.keys() >= set(kinds):
        return None
    return Cache(layers=[known[kind](**setting) for kind, setting in zip(kinds, settings)])
