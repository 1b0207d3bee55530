"""Causal attention for training on a CPU: blocks of queries against the keys that they may see, as plain products.

PyTorch's own CPU kernel is made for long sequences and many heads. At the lengths of conversations most of its time
does not go into products: measured with one thread (4 rows of 240 tokens, 4 heads of 256, one key head, bf16), forward
and backward pass took 29 ms there and 12 ms here, with the same error against float64. Heads that share a key head are
one product.

As in FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135, sections 3.1 and B.2), probabilities are not
kept for the backward pass but computed again. A block sees all its keys at once, so nothing is needed for that beside
queries and keys.

Rows may lie one after the other, and branch: the answers of a pair follow their prompt, which is there once, and do not
see each other. Each such part is a :class:`Span`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

BLOCK = 256  # queries per block: their scores against 1,000 keys of 4 heads are 4 MB
# Name of what a model is given, and hands on to its attention, where masks say more than that it is causal: parts of a
# picture see each other. It goes along where layers are computed again in a backward pass.
AS_MASKED = "as_masked"
Pieces = tuple[slice, ...]  # of a row, one after the other


class Span(NamedTuple):
    """Queries of a row, and the keys that the last of them sees, of which the queries' own places are the last."""

    queries: slice
    keys: Pieces


class CausalAttention(torch.autograd.Function):
    """``softmax(scale q k^T) v`` over the keys up to each query, or the last ``window`` of them."""

    @staticmethod
    def forward(ctx, q, k, v, scale, window, spans=None):
        """Attention of each row with itself, or within its parts.

        Args:
            q: (batch, heads, length, d); k, v (batch, key heads, length, d).
            spans: the parts of each row, which together have each query once; None for the whole row.

        Returns:
            (batch, length, heads, d).
        """
        batch, heads, length, width = q.shape
        out = torch.empty(batch, length, heads, v.shape[-1], dtype=q.dtype)
        spans = spans or [Span(slice(0, length), (slice(0, length),))]
        for queries, keys, hidden in _blocks(spans, window):
            for row, group, key in _groups(q, k):
                share = _shares(q[row, group, queries], _taken(k[row, key], keys), scale, hidden)
                seen = share.to(q.dtype).flatten(0, 1) @ _taken(v[row, key], keys)
                out[row, queries, group] = _split(seen, share).transpose(0, 1)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.window, ctx.spans = scale, window, spans
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # Sums over blocks of queries, kept wide.
        grad_k, grad_v = (torch.zeros(t.shape, dtype=_wide(t)) for t in (k, v))
        for queries, keys, hidden in _blocks(ctx.spans, ctx.window):
            for row, group, key in _groups(q, k):
                own_k = _taken(k[row, key], keys)
                share = _shares(q[row, group, queries], own_k, ctx.scale, hidden)
                block = grad[row, queries, group].transpose(0, 1)
                narrow = block.reshape(-1, block.shape[-1])
                _add(grad_v[row, key], keys, share.flatten(0, 1).to(q.dtype).t() @ narrow)
                inner = _split((narrow @ _taken(v[row, key], keys).t()).to(share.dtype), share)
                inner -= (block.to(share.dtype) * out[row, queries, group].transpose(0, 1)).sum(-1, keepdim=True)
                inner = inner.mul_(share).mul_(ctx.scale).to(q.dtype).flatten(0, 1)
                grad_q[row, group, queries] = _split(inner @ own_k, share)
                _add(grad_k[row, key], keys, inner.t() @ q[row, group, queries].reshape(-1, q.shape[-1]))
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(spans: Sequence[Span], window: int | None) -> Iterator[tuple[slice, Pieces, torch.Tensor]]:
    """Queries, the keys that any of them sees, and which of those each does not see (queries, keys)."""
    for queries, keys in spans:
        length = sum(piece.stop - piece.start for piece in keys)
        before = length - (queries.stop - queries.start)  # keys that all queries see
        for start in range(before, length, BLOCK):
            end = min(start + BLOCK, length)
            first = max(0, start - window + 1) if window else 0
            distance = torch.arange(start, end)[:, None] - torch.arange(first, end)
            hidden = distance < 0 if not window else (distance < 0) | (distance >= window)
            shift = queries.start - before
            yield slice(start + shift, end + shift), _part(keys, first, end), hidden


def _part(pieces: Pieces, first: int, end: int) -> Pieces:
    """The places from ``first`` to ``end`` of those that the pieces have together."""
    found, past = [], 0
    for piece in pieces:
        size = piece.stop - piece.start
        low, high = max(first - past, 0), min(end - past, size)
        if low < high:
            found.append(slice(piece.start + low, piece.start + high))
        past += size
    return tuple(found)


def _taken(rows: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """These rows of (length, d), one after the other."""
    return rows[pieces[0]] if len(pieces) == 1 else torch.cat([rows[piece] for piece in pieces])


def _add(rows: torch.Tensor, pieces: Pieces, more: torch.Tensor) -> None:
    """Add to these rows of (length, d)."""
    for piece, own in zip(pieces, more.split([piece.stop - piece.start for piece in pieces])):
        rows[piece] += own


def _groups(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, slice, int]]:
    """Row, query heads, and the key head that they share."""
    size = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        for key in range(k.shape[1]):
            yield row, slice(key * size, (key + 1) * size), key


def _shares(queries: torch.Tensor, keys: torch.Tensor, scale: float, hidden: torch.Tensor) -> torch.Tensor:
    """Attention probabilities (heads of the group, queries, keys) in fp32 or wider."""
    product = queries.reshape(-1, queries.shape[-1]) @ keys.t()
    scores = _split(product.to(_wide(queries)), queries).mul_(scale).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def _split(product: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(heads x queries, n) as (heads, queries, n)."""
    return product.view(*like.shape[:2], product.shape[-1])


def plain_causal(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 attention_mask: torch.Tensor | None, dropout: float, is_causal: bool | None,
                 more: dict[str, Any]) -> bool:
    """Whether a call of transformers' attention means causal attention of rows with themselves and no more.

    Rows are padded on the right, or packed with their ends told otherwise, so a mask can only be there for the window.

    Args:
        more: what else the attention function was given by name.
    """
    return (not dropout and is_causal is not False and getattr(module, "is_causal", False) and not more.get(AS_MASKED)
            and query.shape[2] == key.shape[2] and key.shape[1] == value.shape[1]
            and all(more.get(name) is None for name in ("position_bias", "softcap", "s_aux", "cache"))
            and (attention_mask is None or bool(more.get("sliding_window"))))


_spans: Sequence[Span] | None = None


@contextlib.contextmanager
def within(spans: Sequence[Span]) -> Iterator[None]:
    """Let attention in a model on the CPU keep to these parts of each row, while the context lasts."""
    global _spans
    _spans = spans
    try:
        yield
    finally:
        _spans = None


def in_spans() -> bool:
    """Whether attention has to keep to parts of rows now, or else to refuse: see :func:`within`."""
    return _spans is not None


def causal_attention_or(theirs: Any) -> Any:
    """transformers' attention function ``theirs`` with ours in its place wherever the two mean the same.

    Args:
        theirs: transformers' function for SDPA.
    """
    def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
        if query.device.type != "cpu" or not plain_causal(module, query, key, value, attention_mask, dropout, is_causal,
                                                          kwargs):
            if _spans is not None:
                raise RuntimeError("rows cannot share a beginning: a layer's attention is more than causal")
            return theirs(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                          is_causal=is_causal, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = None if attention_mask is None else kwargs["sliding_window"]
        return CausalAttention.apply(query, key, value, scale, window, _spans), None

    return attention
