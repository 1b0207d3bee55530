"""Whether a number format keeps what was learned: what it loses beside what the training gained, in nats per token.

Both are differences of the mean negative log-likelihood of the learned tokens of validation rows, which training and
export have measured already.
"""

from __future__ import annotations

import math

from gemma_tune.export.quant_loss import Loss
from gemma_tune.run.session import Session
from gemma_tune.run.stage import OUTSIDE

# A quarter, as for the merged model itself (`merge.check`): less is hard to tell in answers, and more is what the
# training was for. The demo's q4_k_m gives back over half of it, its q5_k_m nothing.
PART_OF_GAIN = 0.25
# Where nothing is known of the training: 4-bit formats cost well trained models of 1B and more a few per cent.
PART_OF_PERPLEXITY = 0.25
LEAST = math.log(1.05)  # a loss that is never marked, so that a training which gained little marks no sound format


def gained(session: Session) -> float | None:
    """Nats per token by which the run's training lowered the loss of its validation rows; None where that is unknown.

    It is where the adapter came from elsewhere, or the rows are others by now.
    """
    stages = session.manifest.stages
    train, merge, prepared = (stages.get(name) for name in ("train", "merge", "prepare"))
    if not (train and merge and prepared) or f"{OUTSIDE}adapter" in merge["inputs"]:
        return None
    if train["inputs"].get("valid_rows", {}).get("sha256") != prepared["outputs"]["valid_rows"]["sha256"]:
        return None
    before, after = (train["summary"].get(f"eval_loss_{when}") for when in ("before", "after"))
    return before - after if before is not None and after is not None and before > after else None


def what_it_loses(loss: Loss, reference: Loss, gain: float | None) -> str | None:
    """What is to be said against a format; None if nothing is.

    Args:
        loss: of the format.
        reference: of f16.
        gain: what the training gained, in nats per token; None where that is not known.
    """
    lost = math.log(loss.perplexity / reference.perplexity)
    if gain is None:
        worse = loss.perplexity / reference.perplexity - 1
        return f"predicts {worse:.0%} worse than f16" if worse > PART_OF_PERPLEXITY else None
    if lost <= max(LEAST, PART_OF_GAIN * gain):
        return None
    return "loses all that was learned" if lost >= gain else f"loses {lost / gain:.0%} of what was learned"
