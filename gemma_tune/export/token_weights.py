"""How much a token counts when a matrix is rounded: by how much what the model predicts depends on its output there.

An error e of a matrix's output at a token raises the divergence from the model by half of (g · e)², see
:mod:`gemma_tune.export.gradients`. Rounding that makes up for its errors keeps the sum of all e² small; weighted by
|g|² it keeps small what matters of them. Without weights a few tokens, such as the first of a sequence, on which hardly
anything depends, can have the largest inputs of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemma_tune.export.gradients import BackwardPass

# Of |g|². One drawn token tells |g|² with an error as large as itself, which a power below 1 levels out. KL in nats of
# SmolLM2's q4_0, on its own rows and on general text: unweighted 0.145, 0.269; 0.5: 0.068, 0.136; 1: 0.071, 0.132.
POWER = 0.75


class TokenWeights:
    """What the tokens of some sequences count for each matrix.

    Args:
        passing: through the model, before its layers are gone back through.
        name: what the checkpoint calls a matrix.
        head: the same of the output head.
    """

    def __init__(self, passing: BackwardPass, name: Callable[[torch.nn.Module], str], head: str):
        self._name = name
        # What depends on the head's input stands for what depends on its output, which would have to be gone through
        # again.
        self._squares = {head: [_squares(gradient) for gradient in passing.gradients]}

    def note(self, module: torch.nn.Module, sequence: int, args: tuple[torch.Tensor, ...],
             gradient: torch.Tensor) -> None:
        """See :data:`gradients.Note`."""
        self._squares.setdefault(self._name(module), []).append(_squares(gradient))

    def weights(self) -> dict[str, torch.Tensor]:
        """By what the checkpoint calls a matrix: fp32 (tokens of all sequences,), of experts (tokens · experts that
        each meets,), 1 on average; a matrix on which nothing depends is left out."""
        found = {name: torch.cat(parts) for name, parts in self._squares.items()}
        return {name: _weights(square) for name, square in found.items() if _known(square)}


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    """|g|² of each token: fp32 (tokens,); of several streams of states, as Gemma 3n has, together."""
    squares = gradient.float().square().sum(-1)
    return squares.reshape(-1, squares.shape[-1]).sum(0)


def _known(squares: torch.Tensor) -> bool:
    mean = float(squares.mean())
    return 0 < mean < float("inf")


def _weights(squares: torch.Tensor) -> torch.Tensor:
    tempered = (squares / squares.mean()) ** POWER
    return tempered / tempered.mean()
