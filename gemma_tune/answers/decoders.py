"""A cache of fixed size, whose steps a GPU records once and then replays; those of each model that are kept.

Each tensor that a captured step reads or changes keeps its address.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemma_tune.answers.lengths import read_before
from gemma_tune.answers.routing import by_token
from gemma_tune.base.capturing import capturing

_LOG = logging.getLogger(__name__)
SMALLEST = 256  # positions of a cache; larger ones are powers of two, so that the next turn finds one that fits
EAGER = 3  # tokens before a step is captured: it has to have run before, and a capture takes about as long as a few
KEPT = 2  # caches of a model, with what was captured on them

_kept: weakref.WeakKeyDictionary[Any, list[Decoder]] = weakref.WeakKeyDictionary()  # the last used ones last
_given_up: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

Chooser = Callable[[Any, Any], Any]  # of ids and logits, see ``decoding.chooser``
Beside = Callable[[int], Mapping[str, Any]]


def nothing_beside(read: int) -> Mapping[str, Any]:
    """What a model that takes ids alone is given beside them."""
    return {}


class Decoder:
    """A cache for so many rows and positions, and what a step reads and changes; all of it keeps its address."""

    def __init__(self, model: Any, rows: int, size: int):
        import torch

        self.size = size
        self.cache = _static_cache(model, size)
        zeros = _zeros(model.device)
        self.ids = zeros(rows, size)  # prompt and answer
        self.mask = zeros(rows, size)  # 0 where the prompt is padded
        self.token, self.position = zeros(rows, 1), zeros(rows, 1)  # what the next step reads, and its place in the row
        self.column = zeros(1)  # of `ids` that is written next
        self.pad = zeros()
        self.ended = zeros(rows, dtype=torch.bool)
        self.finite = zeros(dtype=torch.bool)
        self.stops: Any = None  # (vocabulary), whether a token ends a row
        self._last = last_position(model)
        self._captured: dict[tuple[int, bool], tuple[Any, Any]] = {}  # graph, and the logits that it leaves
        self._pool: Any = None
        self._key = (0, True)
        self._eager = self._made = 0
        self.known: list[int | str] = []  # ids of a single row whose keys and values are in the cache

    def same(self, prompt: Sequence[int | str], state: int) -> int:
        """How many positions of a prompt need not be read again: those of its beginning that are in the cache, computed
        by the model in this state, where they are most of it. What is read behind others takes slower kernels."""
        if not prompt or not self.known or not self.is_of(state):
            return 0
        same = read_before(self.known, prompt)
        return same if 2 * same >= len(prompt) else 0

    def is_of(self, state: int) -> bool:
        """Whether the model was in this state when it last computed here."""
        return self._key[0] == state

    def begin(self, model: Any, ids: Any, mask: Any, stop_ids: frozenset[int], pad: int,
              choose: Chooser | None, state: int, same: int,
              beside: Beside = nothing_beside) -> None:
        """Read the prompts, but for the first ``same`` positions, which are in the cache; choose the first token."""
        import torch

        width = ids.shape[1]
        self.known = []  # what fails leaves nothing half done
        if same:
            for layer in self.cache.layers:
                if layer.keys is not None:
                    layer.cumulative_length.fill_(same)  # what lies behind is hidden, and written over
        else:
            self.cache.reset()
        self.ids[:, :width], self.ids[:, width:] = ids, pad
        self.mask[:, :width], self.mask[:, width:] = mask, 1  # what lies ahead is hidden by its place in the cache
        self.position.copy_(mask.sum(1, keepdim=True) - 1)
        self.column.fill_(width)
        self.pad.fill_(pad)
        self.ended.zero_()
        self.finite.fill_(True)
        self._key = (state, choose is None)
        self._eager, self._made = 0, width
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with _no_planning():
            logits = model(input_ids=ids[:, same:], attention_mask=self.mask if same else mask,
                           position_ids=places[:, same:], past_key_values=self.cache, use_cache=True,
                           **self._last, **beside(same)).logits[:, -1]
        if self.stops is None:
            self.stops = torch.zeros(logits.shape[-1], dtype=torch.bool, device=ids.device)
        self.stops.zero_()
        self.stops[[token for token in stop_ids if token < len(self.stops)]] = True
        logits = self._usable(logits)
        self._append(choose(ids, logits) if choose else logits.argmax(-1))
        self._made += 1

    def step(self, model: Any, choose: Chooser | None, capture: bool) -> None:
        """Append the next token to each row that has not ended."""
        if capture and self._eager >= EAGER and not self.replays and model not in _given_up:
            self._capture(model)
        if found := self._captured.get(self._key):
            graph, logits = found
            graph.replay()
        else:
            logits = self._greedy_step(model) if choose is None else self._logits(model)
            self._eager += 1
        if choose:
            self._append(choose(self.ids[:, :self._made], logits))
        self._made += 1

    @property
    def replays(self) -> bool:
        """Whether the next step is a captured one."""
        return self._key in self._captured

    def read(self, begin: int, end: int) -> tuple[Any, Any]:
        """Columns of the ids on their way to the host, with the event after which they are there; -1: not finite."""
        import torch

        columns = torch.where(self.finite, self.ids[:, begin:end], -1)
        if columns.device.type != "cuda":
            return columns, None
        tokens = columns.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return tokens, event

    def grown(self, model: Any) -> Decoder:
        """The same answers so far, with twice the room."""
        larger = Decoder(model, len(self.ids), 2 * self.size)
        for old, new in zip(self.cache.layers, larger.cache.layers):
            if old.keys is not None:
                new.lazy_initialization(old.keys, old.values)
                new.keys[:, :, :self.size], new.values[:, :, :self.size] = old.keys, old.values
                new.cumulative_length.copy_(old.cumulative_length)
        larger.ids[:, :self.size], larger.mask[:, :self.size], larger.mask[:, self.size:] = self.ids, self.mask, 1
        for name in ("token", "position", "column", "pad", "ended", "finite"):
            getattr(larger, name).copy_(getattr(self, name))
        larger.stops, larger._key, larger._made = self.stops.clone(), self._key, self._made
        larger.known = self.known
        return larger

    def _logits(self, model: Any) -> Any:
        with by_token(base_of(model), len(self.token)):
            out = model(input_ids=self.token, attention_mask=self.mask, position_ids=self.position,
                        past_key_values=self.cache, use_cache=True, **self._last)
        return self._usable(out.logits[:, -1])

    def _greedy_step(self, model: Any) -> Any:
        logits = self._logits(model)
        self._append(logits.argmax(-1))
        return logits

    def _usable(self, logits: Any) -> Any:
        """Logits (rows, vocabulary) in fp32; rows that are not finite are noted, and made harmless to choose from."""
        import torch

        logits = logits.float()
        finite = torch.isfinite(logits.amax(-1, keepdim=True))  # a NaN anywhere is the largest
        self.finite.logical_and_(finite.all())
        return torch.where(finite, logits, 0.0)

    def _append(self, chosen: Any) -> None:
        import torch

        token = torch.where(self.ended, self.pad, chosen)
        self.ended.logical_or_(self.stops[token])
        self.token.copy_(token[:, None])
        self.ids.index_copy_(1, self.column, self.token)
        self.column.add_(1)
        self.position.add_(1)

    def _capture(self, model: Any) -> None:
        """Record a step. Where that fails the answer goes on as before, and later ones are made by ``generate``."""
        try:
            with capturing(self._pool) as graph:
                logits = self._greedy_step(model) if self._key[1] else self._logits(model)
        except Exception as e:  # noqa: BLE001 - whatever a model does that cannot be captured
            give_up(model, f"a step cannot be captured: {e}")
            return
        self._pool = graph.pool()
        self._captured[self._key] = graph, logits


def _no_planning() -> Any:
    """Attention without cuDNN, which makes a plan for each length of prompt: 0.1 to 2.3 s on an H100, where the other
    kernels answered in 0.04."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _static_cache(model: Any, size: int) -> Any:
    """A layer of so many positions for each that has keys and values of its own.

    Layers with a sliding window have them all as well, and the mask hides what is behind the window: transformers' own
    layer for them counts in Python whether the window is full, which a captured step would not see change.
    """
    from transformers.cache_utils import Cache, DummyLayer, StaticLayer

    return Cache(layers=[DummyLayer() if kind == "dummy" else StaticLayer(max_cache_len=size)
                         for kind in layer_types(base_of(model))])


def layer_types(base: Any) -> list[str]:
    """The kind of each layer of a model, by its configuration."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    return get_layer_types_and_kwargs(base.config.get_text_config(decoder=True))[0]


def base_of(model: Any) -> Any:
    """The model of transformers, with an adapter's layers inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def last_position(model: Any) -> dict[str, int]:
    """What has a model make logits of the last position alone, if it can."""
    known = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    return {"logits_to_keep": 1} if known else {}


def _zeros(device: Any) -> Callable[..., Any]:
    import torch

    return lambda *shape, dtype=torch.long: torch.zeros(shape, dtype=dtype, device=device)


# ---- those that are kept ---------------------------------------------------------------------------------------------

def give_up(model: Any, reason: str) -> None:
    """Let ``generate`` answer for this model from now on; what was kept of it frees its memory."""
    _LOG.debug("answers are made by generate, without captured steps: %s", reason)
    _kept.pop(model, None)
    _given_up[model] = reason


def forget(model: Any) -> None:
    """Free the memory of what is kept of a model."""
    _kept.pop(model, None)


def state_of(model: Any) -> int:
    """What a captured step depends on besides its buffers: where the weights lie, and which adapters take part."""
    adapters = [(module.disable_adapters, *module.active_adapters, *getattr(module, "merged_adapters", ()))
                for module in model.modules() if hasattr(module, "_disable_adapters")]  # PEFT's layers
    weights = [tensor.data_ptr() for tensor in itertools.chain(model.parameters(), model.buffers())]
    return hash((model.training, *adapters, *weights))


def take(model: Any, rows: int, least: int, wanted: int, prompt: Sequence[int | str], state: int,
          ) -> tuple[Decoder, int]:
    """A decoder for so many rows, out of those kept if one fits, or has read most of the prompt, and how much of it;
    nobody else has it while it is used."""
    kept = _kept.get(model, [])
    read = [decoder.same(prompt, state) for decoder in kept]
    if any(read):
        same = max(read)
        found = kept.pop(read.index(same))
        while found.size <= least:
            found = found.grown(model)
        return found, same
    fitting = [d for d in kept if len(d.ids) == rows and least < d.size <= max(SMALLEST, 8 * wanted)]
    if len(kept) < KEPT:  # while there is room, a conversation with another adapter, or none, keeps its own
        fitting = [decoder for decoder in fitting if not decoder.known or decoder.is_of(state)]
    if fitting:
        found = max(fitting, key=lambda decoder: decoder.size)
        kept.remove(found)
        return found, 0
    return Decoder(model, rows, max(SMALLEST, 1 << (wanted - 1).bit_length())), 0


def keep(model: Any, decoder: Decoder, known: Sequence[int | str] = ()) -> None:
    """Keep a decoder for the next answer; ``known`` is what its single row has, the last of which may not have been
    read yet."""
    if model in _given_up:
        return
    decoder.known = list(known[:-1])
    kept = _kept.setdefault(model, [])
    kept.append(decoder)
    del kept[:-KEPT]


def has_given_up(model: Any) -> bool:
    """Whether ``generate`` answers for this model."""
    return model in _given_up
