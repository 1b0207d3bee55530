"""Linear cross-entropy for a frozen head, fused: loss and gradient in one pass, never the whole logits.

A Gemma's vocabulary has 262,144 entries, so the logits of one small batch are larger than the model. Only the
positions that are trained need them, a block of rows at a time, and because the head is frozen the gradient with
respect to the hidden states can be finished in the same block: for one row with label y,

    loss = logsumexp(z) - z_y,   d loss / d h = (softmax(z) - onehot(y)) W,   z = h W^T

With soft-capping (Gemma 2) z = c * tanh(u / c), whose derivative 1 - (z / c)^2 multiplies the inner gradient.
"""

from __future__ import annotations

import torch

IGNORE_INDEX = -100
# Rows per block: large enough that the two matrix products run at full speed, small enough that the fp32 block of
# logits of a 262k vocabulary stays near 270 MB.
ROW_BLOCK = 256


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap, scale):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], ROW_BLOCK):
            rows = slice(start, start + ROW_BLOCK)
            block_loss, block_grad = _block(hidden[rows], weight, labels[rows], softcap, scale, grad is not None)
            total += block_loss
            if grad is not None:
                grad[rows] = block_grad
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None, None, None


def _block(hidden, weight, labels, softcap, scale, with_grad):
    """Loss sum (fp32 scalar) and, if asked, the gradient (rows, d) of one block of rows."""
    logits = (hidden @ weight.t()).float()
    if scale != 1.0:
        logits *= scale
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    index = labels.unsqueeze(1)
    target = logits.gather(1, index)
    lse = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (lse - target).sum()
    if not with_grad:
        return loss, None
    probabilities = (logits - lse).exp_()
    probabilities.scatter_add_(1, index, torch.full_like(target, -1.0))
    if softcap:
        probabilities *= 1.0 - (logits / softcap).square()
    return loss, (probabilities.to(weight.dtype) @ weight).mul_(scale)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Summed next-token cross-entropy over the trained positions, with a head that gets no gradient.

    Args:
        hidden: last hidden states (batch, length, d), in the compute dtype.
        weight: output embedding (vocabulary, d), frozen; same dtype and device as ``hidden``.
        labels: token ids (batch, length), ``IGNORE_INDEX`` where nothing is learned. Position t of ``hidden``
            predicts ``labels[:, t + 1]``; the shift happens here.
        softcap: final logit soft-capping constant, in logits, or None.
        scale: factor on the raw logits before capping (1 for Gemma).

    Returns:
        fp32 scalar, the sum in nats: the caller divides by the number of trained tokens, so that accumulation over
        micro-batches and processes has one normaliser. Zero, with a zero gradient, when no position is trained.

    Raises:
        ValueError: if the head requires a gradient, which this function would silently drop.
    """
    if weight.requires_grad:
        raise ValueError("linear_cross_entropy is for a frozen head; this one requires a gradient")
    targets = labels[:, 1:]
    trained = targets != IGNORE_INDEX
    rows = hidden[:, :-1][trained]
    return _FusedLinearCrossEntropy.apply(rows, weight, targets[trained], softcap, scale)
