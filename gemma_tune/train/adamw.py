"""AdamW of an adapter whose weights and gradients are one tensor each: its step is one kernel.

Of hundreds of small tensors Python makes lists in every step, which takes longer than the step itself. What is kept of
each weight, and how checkpoints hold it, is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from gemma_tune.train.gradients import Gradients


class AdamWAsOne(torch.optim.AdamW):
    """PyTorch's fused AdamW, with the same results.

    Args:
        groups: of weights, with all settings, as another AdamW has them.
        gradients: of these weights, at fixed places.
        bad: 1 where a step must not be taken (fp32 scalar), which is looked at on the device only.
    """

    # Accelerate's wrapper, which such an optimiser gets otherwise, looks for a package on the disk in each step.
    _is_accelerate_prepared, step_was_skipped = True, False

    def __init__(self, groups: Iterable[Mapping[str, Any]], gradients: Gradients, bad: torch.Tensor):
        super().__init__([{**group} for group in groups])
        self.gradients, self.found_inf = gradients, bad
        self._moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # and the number of steps
        self._laid_out = False  # whether it has been tried

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step with the gradients as they are."""
        if not self._laid_out:
            self._moments, self._laid_out = self._together(), True
        if self._moments is None:
            super().step()
            return
        first, second, steps = self._moments
        group = self.param_groups[0]
        adamw([self.gradients.weights_as_one], [self.gradients.as_one], [first], [second], [], [steps], fused=True,
              found_inf=self.found_inf, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
              lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's, in which each weight has a number of steps of its own."""
        if self._moments is not None:
            for state in self.state.values():
                state["step"].copy_(self._moments[-1])
        return super().state_dict()

    def forget(self) -> None:
        """Free the moments, which begin anew should there be another step."""
        self.state.clear()
        self._moments, self._laid_out = None, False

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """PyTorch's, of any AdamW."""
        super().load_state_dict(state_dict)
        self._moments, self._laid_out = None, False

    def _together(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Lay what is known of the weights out as they are; None, with nothing changed, where not all are alike: one
        is not at its place, of a part the decay is another, or the steps are fewer, as an earlier part of the training
        had no gradient of it."""
        weights, places = self.gradients.weights, self.gradients.parts(self.gradients.weights_as_one)
        # The library puts norms, of modules that are trained as a whole, into a group of their own.
        groups = [group for group in self.param_groups if group["params"]]
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        if ({id(weight) for group in groups for weight in group["params"]} != {*map(id, weights)}
                or any(others != settings[0] for others in settings)
                or any(weight.data_ptr() != place.data_ptr() for weight, place in zip(weights, places))):
            return None
        known = [self.state.get(weight, {}) for weight in weights]
        taken = {float(state.get("step", 0)) for state in known}
        if len(taken) > 1:
            return None
        first, second = (self._moved(name, known) for name in ("exp_avg", "exp_avg_sq"))
        for weight, *moments in zip(weights, self.gradients.parts(first), self.gradients.parts(second)):
            step = torch.zeros((), device=first.device)
            self.state[weight] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        return first, second, torch.full((), taken.pop(), device=first.device)

    def _moved(self, name: str, known: Sequence[dict[str, Any]]) -> torch.Tensor:
        """One moment of all weights, laid out as they are (n,), which those that know some of it give away: by way of
        the CPU, as on a GPU there need not be room for it twice."""
        before = [state.pop(name).cpu() if name in state else None for state in known]
        whole = self.gradients.room()
        for place, moment in zip(self.gradients.parts(whole), before):
            if moment is not None:
                place.copy_(moment)
        return whole
