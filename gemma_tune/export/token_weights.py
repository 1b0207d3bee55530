"""How much a token counts when a matrix is rounded: by how much what the model predicts depends on its output there.

An error e of a matrix's output at a token raises the divergence from the model by half of (g · e)², see
:mod:`gemma_tune.export.gradients`. Rounding that makes up for its errors keeps the sum of all e² small; weighted by
|g|² it keeps small what matters of them. Without weights a few tokens, such as the first of a sequence, on which hardly
anything depends, can have the largest inputs of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gemma_tune.export.gradients import BackwardPass
from gemma_tune.models.layerwise import LayerwiseModel

# Of |g|². One drawn token tells |g|² with an error as large as itself, which a power below 1 levels out. KL in nats of
# SmolLM2's q4_0, on its own rows and on general text: unweighted 0.145, 0.269; 0.5: 0.068, 0.136; 1: 0.071, 0.132.
POWER = 0.75

Progress = Callable[[int, int], None]


def token_weights(model: LayerwiseModel, sequences: Sequence[np.ndarray],
                  on_progress: Progress | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the tokens of some sequences count for each matrix.

    Args:
        model: the merged model.
        sequences: token ids, (length,) each.
        on_progress: as for :class:`BackwardPass`.

    Returns:
        By what the checkpoint calls a matrix: fp32 (tokens of all sequences,), 1 on average; a matrix on which nothing
        depends is left out. And what the head is multiplied with: (tokens, hidden size), in the model's type.

    Raises:
        ValueError: the model has no output head.
    """
    passing = BackwardPass(model, sequences, on_progress)
    squares: dict[torch.nn.Module, list[torch.Tensor]] = {}

    def note(module: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> None:
        squares.setdefault(module, []).append(_squares(gradient))

    # What depends on the head's input stands for what depends on its output, which would have to be gone through again.
    states, of_head = passing.head.states, torch.cat([_squares(gradient) for gradient in passing.gradients])
    del passing.head
    for _ in passing.layers(note):
        pass
    found = {model.name(module): torch.cat(parts) for module, parts in squares.items()} | {str(model.head): of_head}
    return {name: _weights(square) for name, square in found.items() if _known(square)}, states


def _squares(gradient: torch.Tensor) -> torch.Tensor:
    """|g|² of each token: fp32 (tokens,)."""
    return gradient.flatten(0, -2).float().square().sum(1)


def _known(squares: torch.Tensor) -> bool:
    mean = float(squares.mean())
    return 0 < mean < float("inf")


def _weights(squares: torch.Tensor) -> torch.Tensor:
    tempered = (squares / squares.mean()) ** POWER
    return tempered / tempered.mean()
