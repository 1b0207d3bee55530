"""What each tensor of the merged model is made of: names, shapes and tied embeddings, before anything is written.

Tensors are found by the names that the running model has for them, see ``lora.names``. The files keep their names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import READABLE, StoredTensor
from gemma_tune.lora.files import Adapter, Lora
from gemma_tune.lora.names import found_among, found_experts, running_name

HEAD = "lm_head.weight"
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte)\.weight$")
_NONE = None, None
_ROWS = 4096  # of a matrix that are compared at once
_ANOTHER_MODEL = "the adapter belongs to another model: merge it into its own base"


@dataclass(frozen=True)
class Part:
    """Rows of one expert's matrix: part ``number`` of ``of`` equal ones below one another."""

    expert: int
    number: int
    of: int


@dataclass(frozen=True)
class Piece:
    """A tensor of the merged model.

    Attributes:
        name: in the file.
        source: where its numbers come from, in the base or in the adapter.
        dtype: the number type that it is written in, as safetensors calls it.
        file: name of the file that it goes to.
        lora: what is added.
        transposed: it is stored as (in, out).
        part: of experts, which of their matrices it is; None where it is the whole of what ``lora`` changes.
        rows: numbers of rows that were trained by themselves, and these (n, width), which take the place of its own.
    """

    name: str
    source: StoredTensor
    dtype: str
    file: str
    lora: Lora | None = None
    transposed: bool = False
    part: Part | None = None
    rows: tuple[list[int], StoredTensor] | None = None

    @property
    def bytes(self) -> int:
        return dataclasses.replace(self.source, dtype=self.dtype).bytes

    @property
    def copied(self) -> bool:
        """Its bytes are the source's."""
        return self.lora is None and self.rows is None and self.dtype == self.source.dtype


@dataclass(frozen=True)
class MergePlan:
    """The merged model's tensors in the order in which they are written.

    Attributes:
        changed: how many of them the adapter changes.
        untied: the head becomes another tensor than the embedding, which they may have shared in the base.
        entries: of the vocabulary, as many as the embedding has; None where that is not known.
        base_entries: as many as the base has.
    """

    pieces: list[Piece]
    changed: int
    untied: bool
    entries: int | None = None
    base_entries: int | None = None

    @property
    def vocabulary(self) -> int | None:
        """Entries of embedding and head, where the adapter was trained with another number than the base has."""
        return self.entries if self.entries != self.base_entries else None

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)


def plan_merge(base: Mapping[str, StoredTensor], adapter: Adapter, dtype: str | None = None) -> MergePlan:
    """Find a tensor of the base for everything that the adapter holds.

    Args:
        base: the tensors of the checkpoint by their names on the disk, as ``open_tensors`` gives them.
        dtype: the type to write floating-point tensors in, as safetensors calls it; None keeps each one's own.

    Raises:
        UserError: the adapter changes what the base does not have, or has in another shape; all of it is listed. Or it
            was trained with a vocabulary of another size, and does not hold all embeddings of that.
    """
    names = _Names(base)
    layers = {names.of(f"{layer}.weight"): lora for layer, lora in adapter.layers.items() if not lora.experts}
    experts = {name: (lora, part) for layer, lora in adapter.layers.items() if lora.experts
               for name, part in names.of_experts(layer, lora.experts)}
    copies = {names.of(name): tensor for name, tensor in adapter.copies.items()}
    if names.tied in copies and adapter.config.get("ensure_weight_tying"):
        copies.setdefault(HEAD, copies[names.tied])  # which a training's checkpoint has once
    rows = {names.of(f"{module}.weight"): found for module, found in adapter.rows.items()}
    in_training = {names.of(name): tensor for name, tensor in adapter.base_tensors.items()}
    if names.missing:
        raise UserError(f"{len(names.missing)} tensors that {adapter.folder} adapts are not in the base model",
                        _ANOTHER_MODEL, sorted(names.missing)[:20])
    before = dict(base)
    if names.tied:  # one tensor under two names
        before[HEAD] = base[names.tied]
        shared = in_training.get(names.tied) or in_training.get(HEAD)
        in_training |= {names.tied: shared, HEAD: shared} if shared else {}
        rows = ({HEAD: rows[names.tied]} if names.tied in rows else {}) | rows
    sources = {name: copies.get(name) or in_training.get(name) or tensor for name, tensor in before.items()}
    vocabulary, ends = _other_vocabulary(names, before, sources, layers)
    expected = {name: (vocabulary, *tensor.shape[1:]) if name in ends else tensor.shape
                for name, tensor in before.items()}
    transposed = _transposed(expected, layers, adapter)
    lacking = {name for name in ends if sources[name].shape != expected[name] and sources[name] is before[name]}
    if problems := [*_unlike_base(expected, sources, lacking), *_unfit_layers(expected, before, layers, transposed),
                    *_unfit_experts(before, experts), *_unfit_rows(expected, rows, layers.keys() | copies.keys())]:
        raise UserError(f"{adapter.folder} does not fit the base model", _ANOTHER_MODEL, problems[:20])
    if lacking:
        raise UserError(f"{adapter.folder} was trained with a vocabulary of {vocabulary:,} entries, where the base has "
                        f"{before[names.embedding].shape[0]:,}, and does not hold all of their embeddings",
                        "save it again where it was trained: save_pretrained(DIR, save_embedding_layers=True)",
                        [f"{name} is the base's, of {before[name].shape[0]:,} entries" for name in sorted(lacking)])
    touched = {names.embedding, names.head} & (layers.keys() | copies.keys())
    untied = bool(touched) and not (names.tied and _agree(names.tied, layers, copies))
    untied |= bool(names.tied) and rows.get(HEAD) != rows.get(names.tied)
    kept = [name for name in sources if untied or not (names.tied and name == HEAD)]
    pieces = [Piece(names.on_disk(name), sources[name], _dtype(before[name].dtype, dtype), before[name].path.name,
                    layers.get(name) or experts.get(name, _NONE)[0], name in transposed, experts.get(name, _NONE)[1],
                    rows.get(name))
              for name in kept]
    changed = sum(any(name in some for some in (layers, experts, copies, rows))
                  or sources[name].shape != before[name].shape for name in kept)
    own = before[names.embedding].shape[0] if names.embedding else None
    return MergePlan(pieces, changed, untied, vocabulary or own, own)


def _other_vocabulary(names: _Names, base: Mapping[str, StoredTensor], sources: Mapping[str, StoredTensor],
                      layers: Mapping[str, Lora]) -> tuple[int | None, set[str]]:
    """The vocabulary's size in training and the tensors that have an entry for each token, if it is not the base's.

    That is what ``resize_token_embeddings`` leaves behind, where tokens were added or a padded vocabulary was cut.
    """
    if names.embedding is None:
        return None, set()
    modules = {name.removesuffix(".weight") for name in (names.embedding, names.head)}
    ends = {name for name in base if name.rpartition(".")[0] in modules}
    own = {name: base[name].shape[0] for name in ends}  # Mllama's embedding has more entries than its head
    others = {sources[name].shape[0] for name in ends if sources[name].shape[1:] == base[name].shape[1:]
              and sources[name].shape[0] != own[name]}
    adapted = {name: layers[name].shape[1 if layers[name].embedding else 0] for name in ends & layers.keys()}
    others |= {size for name, size in adapted.items() if size != own[name]}
    return (others.pop(), ends) if len(others) == 1 else (None, set())


def _dtype(own: str, wanted: str | None) -> str:
    return wanted if wanted and own in READABLE else own


class _Names:
    """The base's tensors by the names that an adapter may use.

    Attributes:
        embedding: the input embedding's name on the disk; None if there is none under a known name.
        head: the output layer's; ``HEAD`` where it shares the embedding.
        tied: ``embedding`` where the head is no tensor of its own.
        missing: what was asked for and is not there.
    """

    def __init__(self, base: Mapping[str, StoredTensor]):
        self._stored = {running_name(name): name for name in base}
        self.embedding = next((name for name in base if _EMBEDDING.search(name)), None)
        self.head = self._stored.get(HEAD, HEAD)
        self.tied = None if HEAD in self._stored else self.embedding
        self.missing: list[str] = []

    def of(self, name: str) -> str:
        """The name on the disk of the adapter's tensor ``name``; a head that shares the embedding is ``HEAD``."""
        if running_name(name) == HEAD and self.tied:
            return HEAD
        if (found := found_among(self._stored, name)) is not None:
            return self._stored[found]
        self.missing.append(name)
        return name

    def of_experts(self, parameter: str, count: int) -> Iterator[tuple[str, Part | None]]:
        """The names on the disk of a parameter of so many experts, and what each is of it."""
        found = found_experts(self._stored, parameter, count)
        if not found or f"{found[0][0]}_bias" in self._stored:  # which has the matrices the other way round
            self.missing.append(parameter)
            return
        for name, expert, number, parts in found:
            yield self._stored[name], None if expert is None else Part(expert, number, parts)

    def on_disk(self, name: str) -> str:
        """What a tensor is called in the files; a head that was none before, as its repository would."""
        wrapped = name == HEAD and self.tied and self.tied.startswith("language_model.")
        return f"language_model.{HEAD}" if wrapped else name


def _transposed(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Lora], adapter: Adapter) -> set[str]:
    """Layers that are stored as (in, out): embeddings, and the ``Conv1D`` of GPT-2's like.

    PEFT's ``fan_in_fan_out`` says so, but where an adapter has layers of both kinds it is that of the last one, so the
    shape decides; a square weight is taken as the others are.
    """
    embeddings = {name for name, lora in layers.items() if lora.embedding}
    square = {name for name, lora in layers.items() if lora.shape[0] == lora.shape[1]} - embeddings
    turned = {name for name in layers.keys() - embeddings - square if shapes[name] == layers[name].shape[::-1]}
    return embeddings | turned | (square if adapter.transposed or turned else set())


def _unlike_base(shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, StoredTensor],
                 lacking: set[str]) -> Iterator[str]:
    for name, source in sources.items():
        if source.shape != shapes[name] and name not in lacking:
            yield f"{name} has the shape {shapes[name]} in the base, {source.shape} in the adapter"


def _unfit_layers(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, StoredTensor], layers: Mapping[str, Lora],
                  transposed: set[str]) -> Iterator[str]:
    for name, lora in layers.items():
        shape = lora.shape[::-1] if name in transposed else lora.shape
        if shapes[name] != shape:
            yield f"{name} has the shape {shapes[name]} in the base, {shape} in the adapter"
        elif base[name].dtype not in READABLE:
            yield f"{name} is {base[name].dtype} in the base, which is not a type that numbers are added to"


def _unfit_experts(base: Mapping[str, StoredTensor], experts: Mapping[str, tuple[Lora, Part | None]]) -> Iterator[str]:
    for name, (lora, part) in experts.items():
        rows, columns = lora.shape
        shape = (lora.experts, rows, columns) if part is None else (rows // part.of, columns)
        if base[name].shape != shape or part and rows % part.of:
            yield f"{name} has the shape {base[name].shape} in the base, {shape} in the adapter"
        elif base[name].dtype not in READABLE:
            yield f"{name} is {base[name].dtype} in the base, which is not a type that numbers are added to"


def _unfit_rows(shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, tuple[list[int], StoredTensor]],
                others: Set[str]) -> Iterator[str]:
    for name, (ids, tensor) in rows.items():
        if name in others:
            yield f"{name} is changed as a whole by the adapter, which has some of its rows by themselves as well"
        elif shapes[name][1:] != tensor.shape[1:] or max(ids) >= shapes[name][0]:
            yield (f"{name} has the shape {shapes[name]} in the base, and the adapter row {max(ids)} of it, with "
                   f"{tensor.shape[1]} numbers")


def _agree(tied: str, layers: Mapping[str, Lora], copies: Mapping[str, StoredTensor]) -> bool:
    """Whether head and embedding stay one tensor: both were trained, to the same (PEFT's ``ensure_weight_tying``)."""
    if tied in copies and HEAD in copies:
        return not {tied, HEAD} & layers.keys() and _equal(copies[tied], copies[HEAD])
    embedding, head = layers.get(tied), layers.get(HEAD)
    if not embedding or not head or {tied, HEAD} & copies.keys() or embedding.magnitude or head.magnitude:
        return False  # DoRA's lengths are those of columns in one, of rows in the other
    return (embedding.scale == head.scale and _equal(embedding.a, head.b, turned=True)
            and _equal(embedding.b, head.a, turned=True))


def _equal(one: StoredTensor, other: StoredTensor, turned: bool = False) -> bool:
    if one.shape != (other.shape[::-1] if turned else other.shape):
        return False
    if turned:
        return bool((one.rows() == other.rows().T).all())
    return all((one.rows(n, n + _ROWS) == other.rows(n, n + _ROWS)).all() for n in range(0, one.shape[0], _ROWS))
