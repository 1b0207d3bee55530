"""Whether a number format keeps what was learned and what the model knew before, and which one to take.

What it loses is set beside what the training gained, in nats per token. Both are differences of the mean negative
log-likelihood of the learned tokens of validation rows, which training and export have measured already. On general
text, where the training gained nothing, it is set beside f16's own perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from gemma_tune.base.words import size_text
from gemma_tune.config.stages import QUANTS
from gemma_tune.export.quant_loss import GENERAL, REFERENCE, VALIDATION, Loss
from gemma_tune.gguf.types import OF_EXPERTS
from gemma_tune.run.earlier_exports import smallest_sound
from gemma_tune.run.prepared import rows_with_pictures
from gemma_tune.run.session import Session
from gemma_tune.run.state import OUTSIDE

# A quarter, as for the merged model itself (`merge.check`): less is hard to tell in answers, and more is what the
# training was for. Rounded each weight by itself, the demo's q4_0 gives back over a quarter, calibrated it does not.
PART_OF_GAIN = 0.25
# Where nothing is known of the training: 4-bit formats cost well trained models of 1B and more a few per cent.
PART_OF_PERPLEXITY = 0.25
# On general text. Stricter, as it says which format is proposed: the demo's q4_0 costs 18 % there, and its q4_k_m, of
# 12 MB more, nothing.
PART_OF_GENERAL = 0.10
# What to try where these lose too much: the next of their kind, and from the old formats at once eight bits.
_FINER = {"q2_k": "q3_k_m", "q3_k_s": "q3_k_m", "q3_k_m": "q4_k_m", "q3_k_l": "q4_k_m", "q4_k_s": "q4_k_m",
          "q4_k_m": "q5_k_m", "q5_k_s": "q5_k_m", "q5_k_m": "q6_k"}
_KEPT = {VALIDATION: "what was learned", GENERAL: "what the model knew before"}
# What the summary has of the figures of the file to take, where that has them.
_OF_FILE = {"check_largest_error": "largest_error", "check_largest_error_tensor": "largest_error_tensor",
            "loses": "loses"}
LEAST = math.log(1.05)  # a loss that is never marked, so that a training which gained little marks no sound format


def gained(session: Session) -> float | None:
    """Nats per token by which the run's training lowered the loss of its validation rows; None where that is unknown.

    It is where the adapter came from elsewhere, the rows are others by now, or some of them have pictures: number
    formats are measured on the others alone.
    """
    stages = session.manifest.stages
    train, merge, prepared = (stages.get(name) for name in ("train", "merge", "prepare"))
    if not (train and merge and prepared) or f"{OUTSIDE}adapter" in merge["inputs"]:
        return None
    if train["inputs"].get("valid_rows", {}).get("sha256") != prepared["outputs"]["valid_rows"]["sha256"]:
        return None
    before, after = (train["summary"].get(f"eval_loss_{when}") for when in ("before", "after"))
    if before is None or after is None or before <= after:
        return None
    return None if rows_with_pictures(session, "valid") else before - after


def what_it_loses(loss: Loss, reference: Loss, gain: float | None, limit: float = PART_OF_PERPLEXITY) -> str | None:
    """What is to be said against a format; None if nothing is.

    Args:
        loss: of the format.
        reference: of f16.
        gain: what the training gained, in nats per token; None where that is not known.
        limit: without a gain, the part of its perplexity by which a format may be worse.
    """
    lost = math.log(loss.perplexity / reference.perplexity)
    if gain is None:
        worse = loss.perplexity / reference.perplexity - 1
        return f"predicts {worse:.0%} worse than f16" if worse > limit else None
    if lost <= max(LEAST, PART_OF_GAIN * gain):
        return None
    return "loses all that was learned" if lost >= gain else f"loses {lost / gain:.0%} of what was learned"


def said_against(quant: str, losses: Mapping[str, Mapping[str, Loss]], gain: float | None) -> str | None:
    """What is to be said against a format by all texts that it was measured on; None if nothing is.

    Args:
        losses: by text and number format, see :func:`quant_loss.measure`.
        gain: see :func:`what_it_loses`.
    """
    said = []
    for text, measured in losses.items():
        if quant not in measured:
            continue
        own, reference = measured[quant], measured[REFERENCE]
        if text == GENERAL:
            found = what_it_loses(own, reference, None, PART_OF_GENERAL)
            said += [f"{found} on general text"] if found else []
        else:
            said += filter(None, [what_it_loses(own, reference, gain)])
    return " and ".join(said) or None


def file_to_take(figures: Mapping[str, Any]) -> str:
    """Of the formats that an export made the smallest that was measured to be sound, else the first."""
    return smallest_sound(figures) or next(iter(figures))


def with_file_to_take(summary: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """An export's summary with the figures of the file to take, in place of those of another."""
    quant = file_to_take(figures)
    main = figures[quant]
    found = {"quant": quant, "gguf_bytes": main["bytes"], "ollama_name": main["ollama_name"]}
    found |= {name: main[figure] for name, figure in _OF_FILE.items() if figure in main}
    return found | {name: value for name, value in summary.items() if name not in {*found, *_OF_FILE}}


def finer_than(quants: Collection[str]) -> str:
    """The format to try where all of these, and mixes of a size among them, lose too much."""
    named = {"q4_0" if quant == OF_EXPERTS else quant for quant in quants}  # which has four bits, too
    finest = min(named.intersection(QUANTS), key=QUANTS.index, default="q4_0")
    return _FINER.get(finest, "q8_0" if QUANTS.index(finest) > QUANTS.index("q8_0") else REFERENCE)


def conclusion(figures: Mapping[str, Mapping[str, Any]], texts: Collection[str], again: str,
               earlier: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of the formats to take, as a sentence; "" where nothing was measured.

    Args:
        earlier: figures of files of earlier exports that are still good.
        texts: what was measured on.
        again: the command that exports, to which the next format to try is added.
    """
    if not texts:
        return ""
    kept = " and ".join(_KEPT[text] for text in texts)
    if VALIDATION not in texts:
        kept += " (what was learned is not measured)"
    there = {**figures, **earlier}
    if best := smallest_sound(there):
        whence = " from an earlier export" if best in earlier else ""
        alone = "" if len(there) == 1 else f"{whence} is the smallest of these formats that"
        return f"{best} ({size_text(there[best]['bytes'])}){alone} keeps {kept}"
    finer = finer_than(figures)
    these = f"{next(iter(figures))} does not keep" if len(figures) == 1 else "none of these formats keeps"
    return f"{these} {kept}; the next to try is {finer}: {again} --quant {finer}"
