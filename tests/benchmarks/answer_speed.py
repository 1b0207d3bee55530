"""Answers under an adapter: gemma-tune's loaded model beside the same one as plain PEFT uses it.

Both are one model in one process, with and without what ``models.load`` puts on its head; they take turns, and the
best of the rounds counts. Run it from the repository: ``python tests/benchmarks/answer_speed.py --model demo``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, get_peft_model

from gemma_tune.base.listener import Listener
from gemma_tune.lora.layers import target_modules
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.models.source import locate


@contextlib.contextmanager
def plain(head: torch.nn.Module) -> Iterator[None]:
    """The head without what we add to it."""
    hooks = dict(head._forward_pre_hooks)
    head._forward_pre_hooks.clear()
    try:
        yield
    finally:
        head._forward_pre_hooks.update(hooks)


def answers(model: torch.nn.Module, rows: int, prompt: int, tokens: int) -> None:
    """Greedy answers of so many tokens to prompts of random ids."""
    ids = torch.randint(10, 1000, (rows, prompt), generator=torch.Generator().manual_seed(0), device="cpu").to(model.device)
    with torch.inference_mode():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                       min_new_tokens=tokens, max_new_tokens=tokens)


def seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def same_logits(model: torch.nn.Module, head: torch.nn.Module) -> float:
    """Largest difference between the two, of a prompt's last position."""
    ids = torch.arange(10, 40, device=model.device)[None].repeat(4, 1)
    with torch.inference_mode():
        ours = model(input_ids=ids, logits_to_keep=1).logits
        with plain(head):
            return (ours - model(input_ids=ids, logits_to_keep=1).logits).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    base = locate(options.model, None, Listener())
    model = load_model(base.path, Placement("cpu", getattr(torch, options.dtype), "benchmark"))
    model = get_peft_model(model, LoraConfig(r=16, target_modules=target_modules(model, []), task_type="CAUSAL_LM")).eval()
    head = model.get_base_model().get_output_embeddings()
    print(f"largest difference of logits: {same_logits(model, head):.3g}")
    cases = {"first token after 30": (1, 30, 1), "one answer of 32 tokens": (1, 30, 32),
             "ten answers of 4 tokens": (10, 30, 4), "ten answers of 32 tokens": (10, 30, 32)}
    for name, (rows, prompt, tokens) in cases.items():
        def work(rows: int = rows, prompt: int = prompt, tokens: int = tokens) -> None:
            answers(model, rows, prompt, tokens)

        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(seconds(work))
            with plain(head):
                theirs.append(seconds(work))
        best, other = min(ours), min(theirs)
        print(f"{name:26} {best:7.2f} s  {rows * tokens / best:7.1f} tokens/s   plain PEFT {other:7.2f} s  "
              f"{rows * tokens / other:7.1f} tokens/s   {other / best:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
