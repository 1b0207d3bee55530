"""Pieces with pictures in captured steps, see :mod:`gemma_tune.train.captured`.

What was seen goes to the device with the tokens, in one go, so that a replay reads it where the capture did. A model's
own pass counts the tokens of pictures to put features in their places, and the Qwens reckon from pictures' sizes where
tokens are, for both of which a GPU would be waited for. Here places are reckoned on the CPU, and each token fetches its
feature by a running count; the rest of the pass is the model's own, with the masks by which parts of a picture see each
other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from gemma_tune.answers.sight import GRID, Features, layers_of
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.train.batches import trained_count
from gemma_tune.train.buckets import STEP, Bucket
from gemma_tune.train.captured import filled, inputs_of, size_of
from gemma_tune.train.looking import Shown
from gemma_tune.train.products import gradients_aside
from gemma_tune.train.undoing import set_until

_BYTES = 4  # of the numbers that are sent


@dataclass
class LearnedPictures:
    """As :class:`gemma_tune.train.captured.LearnedTokens`, of rows of which any has pictures. A
    :class:`gemma_tune.train.captured.Body`.

    Args:
        model: with its adapter.
        shown: the pictures of the training, all of which were looked at.
    """

    model: Any
    shown: Shown
    what = "steps with pictures"
    _tried: bool = field(default=False, init=False)

    def takes(self, part: Mapping[str, Any]) -> bool:
        return PICTURES in part

    def shape(self, part: Mapping[str, Any]) -> tuple[int, int, int, int]:
        ids = part["input_ids"]
        return (*ids.shape, trained_count(part["labels"]), int((ids == self.shown.eye.soft_id).sum()))

    def size(self, bucket: Bucket) -> int:
        return sum(self._sizes(bucket))

    def filled(self, part: Mapping[str, Any], bucket: Bucket) -> torch.Tensor:
        """Ids, positions and targets as for tokens; then where tokens are by the model's reckoning, if it reckons with
        pictures; then bits of the features of all pictures, from row to row.

        Raises:
            UserError: what was seen is gone or damaged.
            ValueError: the pictures are not those of all tokens that stand for some.
        """
        flat = torch.zeros(self.size(bucket), dtype=torch.int32)
        tokens, places, seen = self._split(flat, bucket)
        tokens.copy_(filled(part, bucket))
        pictures = [self.shown.seen[name] for row in part[PICTURES] for name in row]
        rows, length, _, parts = self.shape(part)
        if places is not None:
            places[:, :rows, :length] = self._reckoned(part["input_ids"], pictures)
        for layer, room in zip(self._layers, seen):
            features = torch.cat([picture[layer] for picture in pictures])
            if len(features) != parts:
                raise ValueError(f"{parts} tokens stand for pictures with {len(features)} features")
            room[:parts] = features
        return flat

    def prepare(self, bucket: Bucket) -> None:
        """Go through the model once with a few tokens: what the first such pass loads, and what it refuses, is no
        matter of a capture."""
        if self._tried:
            return
        weights = [p for p in self.model.parameters() if p.requires_grad]
        device, small = weights[0].device, Bucket(1, STEP, STEP, STEP)
        inputs = torch.zeros(self.size(small), dtype=torch.int32, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), \
                gradients_aside(weights):
            self.loss(inputs, small, torch.ones(2, device=device)).backward()
        self._tried = True

    def loss(self, flat: torch.Tensor, bucket: Bucket, weights: torch.Tensor) -> torch.Tensor:
        tokens, places, seen = self._split(flat, bucket)
        ids, positions, targets = inputs_of(tokens, bucket)
        marks = ids == self.shown.eye.soft_id
        with _looking_for_nothing(self._causal_lm, marks):
            return self.model(input_ids=ids, positions=positions, targets=targets,
                              seen=self._given(ids, marks, places, seen))["loss"] * weights[0]

    # ---- what a model is given ---------------------------------------------------------------------------------------

    def _given(self, ids: torch.Tensor, marks: torch.Tensor, places: torch.Tensor | None,
               seen: Sequence[torch.Tensor]) -> dict[str, Any]:
        """In place of ids and features, of fixed sizes: embeddings in which features are, and what depends on ids."""
        model, kinds = self._causal_lm, self.shown.eye.marks
        text = model.config.get_text_config()
        own = marks.flatten().cumsum(0).sub(1).clamp(min=0)  # number of each token's feature

        def placed(features: torch.Tensor) -> torch.Tensor:
            return features.index_select(0, own).view(*ids.shape, -1)

        # What stands for pictures need not be in the vocabulary.
        words = ids.masked_fill(marks, max(0, text.pad_token_id or 0))
        first, *deep = seen
        embedded = torch.where(marks[..., None], placed(first), model.get_input_embeddings()(words))
        given: dict[str, Any] = {"inputs_embeds": embedded}
        if places is not None:
            given["position_ids"] = places.long()
        if getattr(text, "hidden_size_per_layer_input", None):
            given["per_layer_inputs"] = model.get_decoder().get_per_layer_inputs(words)
        if deep:  # which the model around the decoder would make of features alone
            return given | {"visual_pos_masks": marks, "deepstack_visual_embeds": [placed(one) for one in deep]}
        return given | ({kinds: marks.long()} if kinds else {})

    def _reckoned(self, ids: torch.Tensor, pictures: Sequence[Features]) -> torch.Tensor:
        """Where tokens are (3, rows, length), on the CPU."""
        marks = (ids == self.shown.eye.soft_id).long()
        grids = torch.cat([picture[GRID] for picture in pictures])
        return self._causal_lm.model.get_rope_index(ids, mm_token_type_ids=marks, image_grid_thw=grids)[0]

    # ---- how it is laid out ------------------------------------------------------------------------------------------

    def _split(self, flat: torch.Tensor, bucket: Bucket,
               ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Of what is sent the numbers of tokens; places (3, rows, length), or None; and features (parts, hidden size),
        of each of the layers that take some."""
        tokens, places, *seen = flat.split(self._sizes(bucket))
        dtype, width = self._kind
        return (tokens, places.view(3, bucket.rows, bucket.length) if len(places) else None,
                [bits.view(dtype).view(bucket.parts, width) for bits in seen])

    def _sizes(self, bucket: Bucket) -> list[int]:
        dtype, width = self._kind
        places = 3 * bucket.rows * bucket.length if GRID in self._first else 0
        # Whole numbers: there is room for a multiple of 8 features.
        return [size_of(bucket), places, *[bucket.parts * width * dtype.itemsize // _BYTES] * len(self._layers)]

    @property
    def _causal_lm(self) -> Any:
        return self.model.get_base_model()

    @cached_property
    def _first(self) -> Features:
        """Features of a picture: others have as many numbers for a token, of as many layers."""
        return self.shown.seen[self.shown.names[0]]

    @cached_property
    def _layers(self) -> list[str]:
        return layers_of(self._first)

    @cached_property
    def _kind(self) -> tuple[torch.dtype, int]:
        """The type of embeddings, and numbers of each."""
        # Not that of the embedding's weights, which are wide where they are trained as a whole.
        return self._causal_lm.dtype, self._first[self._layers[0]].shape[1]


@contextlib.contextmanager
def _looking_for_nothing(causal_lm: Any, marks: torch.Tensor) -> Iterator[None]:
    """Tell a model which tokens are of pictures, where Gemma 4 would look for them among its embeddings; and let it add
    what it is given behind its first layers to all of them, nothing to words, where Qwen 3 VL would pick them out."""
    with contextlib.ExitStack() as undo:
        set_until(undo, causal_lm.model, "get_placeholder_mask", lambda *_, **__: (marks,) * 3)
        if hasattr(decoder := causal_lm.get_decoder(), "_deepstack_process"):
            set_until(undo, decoder, "_deepstack_process", _added)
        yield


def _added(hidden: torch.Tensor, marks: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return hidden + torch.where(marks[..., None], features, 0).to(hidden.dtype)
