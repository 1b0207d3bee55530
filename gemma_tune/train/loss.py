"""Linear cross-entropy, fused: loss and gradient in one pass where the head is frozen, and never the whole logits.

A Gemma's vocabulary has 262,144 entries, so the logits of one small batch are larger than the model. Only the
positions that are trained need them, and because the head is frozen the gradient with respect to the hidden states can
be finished on the way: for one row with label y,

    loss = logsumexp(z) - z_y,   d loss / d h = softmax(z) W - W_y,   z = h W^T

The vocabulary is gone through in chunks that stay in a CPU's cache. Like FlashAttention (Dao et al. 2022,
https://arxiv.org/abs/2205.14135, section 3.1) does for attention, the sum of exp(z - m) W is kept with the running
maximum m and rescaled when m grows, so each chunk of logits is made once and read from the cache.

With soft-capping (Gemma 2) z = c * tanh(u / c), whose derivative 1 - (z / c)^2 multiplies the inner gradient.

A GPU is faster with few large products, so there some hundred rows get all their logits in one buffer, which one kernel
turns into the gradient in place. Nothing in either way depends on the data but the numbers themselves: which rows are
trained is told by their targets, no size follows from it, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import once_differentiable

from gemma_tune.models.narrow import widened
from gemma_tune.train.products import at_least_fp32, gradient_of, has_kernels, wide_product

IGNORE_INDEX = -100
# Rows per block: the head's matrix is read once for each, and of a head that is trained the gradient is added to.
ROW_BLOCK = 1024
# Logits per chunk, 4 MB in bf16 and 8 MB in fp32. Measured with one thread (512 rows, 262k x 640, bf16): 0.88 s, while
# the two products on the whole matrix take 0.85 s; whole blocks of logits, 1.32 s.
CHUNK = 1 << 21
# A chunk is a multiple of so many entries of the vocabulary: where rows of logits begin at any address, MKL's fp32
# product took half as long again (AVX2, one thread, 636 x 1024: 3,297 entries 54 GFLOP/s, 3,264 of them 81).
ALIGNED = 64
# Bytes of logits at a time on a GPU: 512 rows of a Gemma's vocabulary in bf16. Its matrix is read once for each.
LOGITS = 256 << 20


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, scale):
        if has_kernels(hidden.device):
            from gemma_tune.train.fused import cross_entropy_

            way = by_kernel(cross_entropy_)
        else:
            way = _by_chunks
        losses, grad = way(hidden, weight, targets, softcap, scale, ctx.needs_input_grad[0])
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        wide = at_least_fp32(grad.dtype)
        # As bf16, a factor such as 1 / 37 would be off by up to 0.4 %, and the whole gradient with it.
        return (grad.to(wide) * grad_output.to(wide).unsqueeze(1)).to(ctx.dtype), None, None, None, None


def _by_chunks(hidden, weight, targets, softcap, scale, with_grad):
    """Losses (rows,), and the gradient of each in the type of ``hidden`` or None."""
    losses = torch.empty(hidden.shape[0], dtype=at_least_fp32(hidden.dtype), device=hidden.device)
    grad = torch.empty_like(hidden) if with_grad else None
    for start in range(0, hidden.shape[0], ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        block = _Block(hidden[rows], weight, targets[rows], softcap, scale)
        losses[rows] = block.losses(with_grad)
        if grad is not None:
            grad[rows] = block.gradient()
    return losses, grad


def by_kernel(cross_entropy_: Callable) -> Callable:
    """The loss by blocks of rows, with ``fused.cross_entropy_`` on the logits of each."""
    def way(hidden, weight, targets, softcap, scale, with_grad):
        """Losses (rows,), and the gradient of each in fp32 or wider, or None."""
        blocks = torch.split(hidden, _rows_at_a_time(*hidden.shape[:1], *weight.shape[:1], hidden.element_size()))
        buffer = hidden.new_empty(len(blocks[0]), len(weight))
        losses, shares, grads = [], [], []
        for block, wanted in zip(blocks, targets.split(len(blocks[0]) or 1)):
            logits = buffer[:len(block)]
            torch.mm(block, weight.t(), out=logits)
            loss, own = cross_entropy_(logits, wanted, softcap, scale, IGNORE_INDEX, with_grad)
            losses.append(loss)
            if with_grad:
                shares.append(own)
                grads.append(wide_product(logits, weight))
        if not with_grad:
            return torch.cat(losses), None
        weights = weight.index_select(0, targets.clamp(min=0))  # the share of a row without target is 0
        return torch.cat(losses), torch.cat(grads).addcmul_(weights, torch.cat(shares).unsqueeze(1))

    return way


def _rows_at_a_time(rows: int, vocabulary: int, size: int) -> int:
    """Equal blocks, so that no product is left with a few rows; multiples of 64, as products are tiled."""
    most = max(64, LOGITS // (vocabulary * size) // 64 * 64)
    blocks = max(1, -(-rows // most))
    return min(most, max(1, -(-rows // (64 * blocks))) * 64)


def _chunk_width(logits: int, rows: int) -> int:
    """Entries of the vocabulary in a chunk of at most so many logits, but for few of them."""
    return max(ALIGNED, logits // max(1, rows) // ALIGNED * ALIGNED)


class _Block:
    """Some rows (n, d) on their way through the vocabulary; statistics are (n, 1) in fp32 or wider."""

    def __init__(self, hidden, weight, labels, softcap, scale):
        self.hidden, self.weight, self.softcap, self.scale = hidden, weight, softcap, scale
        self.labels = labels.unsqueeze(1)
        self.left_out = self.labels == IGNORE_INDEX
        wide = at_least_fp32(hidden.dtype)
        column = (hidden.shape[0], 1)
        self.maximum = torch.full(column, -torch.inf, dtype=wide, device=hidden.device)
        self.sum = torch.zeros(column, dtype=wide, device=hidden.device)  # of exp(z - maximum)
        self.label_logit = torch.zeros(column, dtype=wide, device=hidden.device)
        self.weighted = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)  # of exp(z - maximum) dz/du W

    def losses(self, with_grad: bool) -> torch.Tensor:
        """Loss of each row (n,); with ``with_grad``, what :meth:`gradient` needs is collected too."""
        rows, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        width = min(vocabulary, _chunk_width(CHUNK, rows))
        product = torch.empty(rows, width, dtype=self.hidden.dtype, device=self.hidden.device)
        logits = torch.empty(rows, width, dtype=self.sum.dtype, device=self.hidden.device)
        for start in range(0, vocabulary, width):
            part = widened(self.weight[start:start + width])
            if len(part) < width:
                product, logits = product.new_empty(rows, len(part)), logits.new_empty(rows, len(part))
            self._add(part, start, product, logits, with_grad)
        return (self.maximum + self.sum.log() - self.label_logit).masked_fill_(self.left_out, 0).squeeze(1)

    def _add(self, part, start, product, logits, with_grad):
        torch.mm(self.hidden, part.t(), out=product)
        logits.copy_(product)
        self._cap(logits)
        inside = (self.labels >= start) & (self.labels < start + len(part))
        column = (self.labels - start).clamp_(0, len(part) - 1)
        self.label_logit += torch.where(inside, logits.gather(1, column), 0)
        maximum = torch.maximum(self.maximum, logits.amax(1, keepdim=True))
        shrink = (self.maximum - maximum).exp_()
        # What the chain rule asks for must be taken before the capped logits are gone.
        slope = 1 - (logits / self.softcap).square_() if with_grad and self.softcap else None
        exponents = logits.sub_(maximum).exp_()
        self.sum.mul_(shrink).add_(exponents.sum(1, keepdim=True))
        self.maximum = maximum
        if not with_grad:
            return
        # The label's own share is added in gradient(), in full precision: softmax(z)_y - 1 would be lost in bf16
        # where the model is sure of its answer.
        exponents.scatter_(1, column, torch.where(inside, 0, exponents.gather(1, column)))
        if slope is not None:
            exponents *= slope
        product.copy_(exponents)
        self.weighted.mul_(shrink).add_(product @ part)

    def _cap(self, logits):
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def gradient(self) -> torch.Tensor:
        """d loss / d hidden (n, d), in the type of the statistics."""
        own = (self.label_logit - self.maximum - self.sum.log()).exp_() - 1
        if self.softcap:
            own *= 1 - (self.label_logit / self.softcap).square()
        weights = self.weight.index_select(0, self.labels.squeeze(1).clamp(min=0)).to(self.sum.dtype)
        grad = self.weighted.div_(self.sum).addcmul_(weights, own).mul_(self.scale)
        return grad.masked_fill_(self.left_out, 0)


# ---- a head that is trained ------------------------------------------------------------------------------------------

class _WithHead(torch.autograd.Function):
    """The same with a gradient of the head: ``d loss / d W = (softmax(z) - e_y) h^T``, row by row of the vocabulary.

    For that the sum over the vocabulary has to be known first, so logits are made once in each pass, a chunk at a time.
    """

    @staticmethod
    def forward(ctx, hidden, targets, trained, weight, softcap, scale):
        """Args: as of :func:`rows_cross_entropy`; weight is ``trained``, rounded to the type of ``hidden``."""
        labels = targets.unsqueeze(1)
        hidden = hidden.masked_fill(labels == IGNORE_INDEX, 0)  # a row that only fills up may hold anything
        spread = torch.full(labels.shape, -torch.inf, dtype=at_least_fp32(hidden.dtype), device=hidden.device)
        own = torch.zeros_like(spread)
        for start, _, logits in _chunks_of_logits(hidden, weight, softcap, scale):
            inside, column = _places(labels, start, logits.shape[1])
            own += torch.where(inside, logits.gather(1, column), 0)
            spread = torch.logaddexp(spread, logits.logsumexp(1, keepdim=True))
        ctx.save_for_backward(hidden, labels, spread)
        ctx.trained, ctx.weight, ctx.softcap, ctx.scale = trained, weight, softcap, scale
        return (spread - own).masked_fill_(labels == IGNORE_INDEX, 0).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        hidden, labels, spread = ctx.saved_tensors
        factors = (grad_output.unsqueeze(1) * ctx.scale).masked_fill(labels == IGNORE_INDEX, 0)
        grad = torch.zeros(hidden.shape, dtype=spread.dtype, device=hidden.device)
        to = gradient_of(ctx.trained)
        for start, part, logits in _chunks_of_logits(hidden, ctx.weight, ctx.softcap, ctx.scale):
            inside, column = _places(labels, start, len(part))
            slope = 1 - (logits / ctx.softcap).square_() if ctx.softcap else None
            share = logits.sub_(spread).exp_()
            share.scatter_add_(1, column, torch.where(inside, -1.0, 0.0).to(share.dtype))
            share = (share if slope is None else share.mul_(slope)).mul_(factors).to(hidden.dtype)
            grad += wide_product(share, part)
            to[start:start + len(part)] += wide_product(share.t(), hidden)
        return grad.to(hidden.dtype), None, None, None, None, None


def _chunks_of_logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None,
                      scale: float) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Where a chunk of the vocabulary begins, its part of the head, and the logits (rows, chunk) in fp32 or wider."""
    # On a GPU four tensors of a chunk, in fp32, take what the logits of a frozen head do.
    width = _chunk_width(CHUNK if hidden.device.type == "cpu" else LOGITS // 16, len(hidden))
    for start in range(0, len(weight), width):
        part = weight[start:start + width]
        logits = (hidden @ part.t()).to(at_least_fp32(hidden.dtype))
        if scale != 1.0:
            logits *= scale
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield start, part, logits


def _places(labels: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels (rows, 1) are in a chunk, and in which column; of the others it is any."""
    return (labels >= start) & (labels < start + width), (labels - start).clamp(0, width - 1)


def rows_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    trained: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of rows that predict one token each.

    Which hidden states predict a trained token is the caller's to say, see ``batches.trained_positions``: no size here
    depends on the data.

    Args:
        hidden: last hidden states (rows, d), in the compute dtype.
        weight: output embedding (vocabulary, d), without a gradient; same dtype and device as ``hidden``.
        targets: (rows,) the token that each row predicts; ``IGNORE_INDEX`` for a row that only fills up: it adds
            neither loss nor gradient, whatever is in it.
        softcap: final logit soft-capping constant, in logits, or None.
        scale: factor on the raw logits before capping (1 for Gemma).
        trained: the head whose rounded copy ``weight`` is, where that is trained; its gradient is added to what it has.

    Returns:
        (rows,) in fp32 (float64 for float64 inputs), in nats: minus the log-probability of each row's token. 0, with a
        zero gradient, where it predicts none. Who adds them up divides by the number of trained tokens of the whole
        step, so that accumulation over micro-batches and processes has one normaliser.

    Raises:
        ValueError: if ``weight`` requires a gradient, which this function would silently drop.
    """
    if weight.requires_grad:
        raise ValueError("this loss is for a frozen head; this one requires a gradient")
    if trained is not None:
        return torch.cat([_WithHead.apply(*block, trained, weight, softcap, scale)
                          for block in zip(hidden.split(ROW_BLOCK), targets.split(ROW_BLOCK))])
    return _FusedLinearCrossEntropy.apply(hidden, weight, targets, softcap, scale)
