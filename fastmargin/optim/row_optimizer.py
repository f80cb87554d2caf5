"""The common base of the row-sparse optimisers: groups, steps, modes, and saving of state."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastmargin import deferred, factors
from fastmargin.norms import compute_dtype
from fastmargin.optim.factor_steps import formed, merged, unscale
from fastmargin.optim.owed_steps import OwedSteps, Step, capturing
from fastmargin.optim.row_chunks import (
    as_rows,
    gather,
    merged_rows,
    scatter,
    slices,
)
from fastmargin.rounding import SIXTEEN_BITS, Rounding
from fastmargin.rows import stand_ins
from fastmargin.spec import GradientFactors

UNSAMPLED = ("lazy", "dense", "frozen")
REFUSED = ("amsgrad", "dampening", "maximize")
"""Options of torch's optimisers that a loaded state may contain and that are not supported."""


class _Opaque:
    """Hides a tensor from ``Optimizer.load_state_dict``, which casts to the parameter's type."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class RowOptimizer(Optimizer):
    """Base of :class:`RowSGD` and :class:`RowAdamW`, which define a step."""

    _step_type: ClassVar[type[Step]]
    _row_states: ClassVar[tuple[str, ...]]
    """Names of the states shaped as the parameter, in the order ``Step.update`` takes them."""
    _numbers: ClassVar[tuple[str, ...]]
    """Options that must be numbers, at least 0."""
    _counts: ClassVar[bool]
    """Whether a step depends on its number."""
    fused: bool = False
    """Whether backward passes leave the factors of gradients (:mod:`fastmargin.factors`)."""

    rounding: Rounding | None = None
    """Rounding of 16-bit tensors; None: to nearest."""

    def __init__(self, params, defaults: dict[str, Any]) -> None:
        self._owed: dict[Tensor, OwedSteps] = {}
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises where an option of a group is out of its range."""
        for name in self._numbers:
            if not isinstance(group[name], Real):
                raise TypeError(f"{name} must be a number, got {type(group[name]).__name__}")
            if not group[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {group[name]}")
        if group["unsampled"] not in UNSAMPLED:
            raise ValueError(f"unsampled must be one of {UNSAMPLED}, got {group['unsampled']!r}")
        for name in REFUSED:
            if group.get(name):
                raise ValueError(f"{name} is not supported by {type(self).__name__}; leave it out")

    def _needed_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The ``_row_states`` that a step of this group needs."""
        raise NotImplementedError

    def _check_rows(self, parameter: Tensor) -> None:
        """Raises where rows have no local row numbers for the rounding."""
        if hasattr(parameter, "placements") and self._rounding(parameter) is not None:
            raise TypeError(
                "stochastic_rounding takes no DTensor: give the optimiser the local rows, as the "
                "weight of MarginHead(group=...) is, or leave it out"
            )

    def _check_capture(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Raises where replaying a CUDA graph of this step would not take further steps."""
        if parameter.grad is None and not factors.pending(parameter):
            return
        if self._counts or group["unsampled"] != "frozen" or self._rounding(parameter) is not None:
            raise RuntimeError(
                f"a CUDA graph would repeat this very step of {type(self).__name__}, with its "
                "number, its debts and its noise: capture forward and backward (of sampled "
                "classes with unsampled='dense' or 'frozen') and call step() after each replay, or "
                "use RowSGD with unsampled='frozen' and without stochastic_rounding"
            )
        if not self.state.get(parameter, {}).keys() >= set(self._needed_states(group)):
            raise RuntimeError(
                "a CUDA graph would begin every step with empty momentum: take one step before "
                "the capture"
            )

    def _state_dtype(self, parameter: Tensor) -> torch.dtype:
        """Dtype of ``_row_states``."""
        return compute_dtype(parameter.dtype)

    def _rounding(self, parameter: Tensor) -> Rounding | None:
        """How the weight and states of a parameter are rounded; None: to nearest."""
        if self.rounding is None or not (
            {parameter.dtype, self._state_dtype(parameter)} & set(SIXTEEN_BITS)
        ):
            return None
        place = next(i for i, one in enumerate(self._parameters()) if one is parameter)
        return replace(self.rounding, place=place)

    def _make_step(self, group: dict[str, Any], count: int) -> Step:
        """The ``count``-th step of a parameter of this group, counted from 1."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``Optimizer.add_param_group``; checks the options first."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._keep()

    def _keep(self) -> None:
        """Requests factors instead of gradients, as long as this optimiser exists."""
        if self.fused:
            for parameter in self._parameters():
                factors.keep(parameter, self)

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def settle(self) -> None:
        """Brings all rows of all parameters up to date."""
        for parameter in self._parameters():
            deferred.settle(parameter)
            if parameter in self._owed:
                self._owed[parameter].settle(parameter)  # last_step too, if nothing was pending

    # ---- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew; its value is returned.

        Raises:
            ValueError, TypeError, RuntimeError: an invalid option or gradient, or a CUDA graph
                that would not take further steps; raised before any change.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        in_graph = capturing()
        for group in self.param_groups:
            self._check_group(group)
            for parameter in group["params"]:
                _check_grad(parameter.grad)
                self._check_rows(parameter)
                if in_graph:
                    self._check_capture(parameter, group)
        if not unscale(self, self._parameters()):
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step_parameter(parameter, group)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells a GradScaler that the step itself divides by the scale: it cannot see factors."""
        return self.fused

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """One step of a parameter, if it has a gradient or the factors of one."""
        grad, found = parameter.grad, factors.take(parameter)
        if found:
            whole = merged(found) if grad is None else None
            # sampled classes with a dense gradient are not frozen: all rows are updated
            if whole is not None and (
                whole.index is None or whole.sparse_grad or group["unsampled"] != "frozen"
            ):
                self._take_step(parameter, group, whole)
                return
            grad = formed(parameter, found, grad)
        if grad is not None:
            self._take_step(parameter, group, grad)

    def _take_step(
        self, parameter: Tensor, group: dict[str, Any], grad: Tensor | GradientFactors
    ) -> None:
        state = self.state[parameter]
        dtype = compute_dtype(parameter.dtype)
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        for name in self._needed_states(group):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=self._state_dtype(parameter))
        owed = self._ready(parameter, state, group["unsampled"])
        state["step"] += 1
        count, rounding = int(state["step"]), self._rounding(parameter)
        step = self._make_step(group, count)
        key = None if rounding is None else rounding.key(count)
        names = [name for name in self._row_states if name in state]
        tensors = [as_rows(tensor) for tensor in (parameter.data, *map(state.get, names))]
        by_factors = isinstance(grad, GradientFactors)
        every_row = grad.index is None if by_factors else not grad.is_sparse
        if every_row:
            deferred.settle(parameter)
        if by_factors:
            self._step_by_factors(tensors, grad, step, key)
            if owed is not None and not every_row:
                _note_step(owed, grad.index)
        elif every_row:
            grad = as_rows(grad)
            for start, stop, rows in slices(tensors, dtype, key):
                step.update(*rows, grad[start:stop].to(dtype))
        else:
            _update_sparse(tensors, grad, step, dtype, owed, key)
        # a backward through weights from before this step must raise, also for rows moved later
        torch.autograd.graph.increment_version(parameter)
        if owed is None:
            return
        if every_row:
            owed.all_taken()
            return
        owed.append(step)
        if owed.owing:
            deferred.owe(parameter, owed)
            # users of a dense gradient need not know of pending updates
            if group["unsampled"] == "dense" or (by_factors and not grad.sparse_grad):
                deferred.settle(parameter)

    def _step_by_factors(
        self, tensors: list[Tensor], found: GradientFactors, step: Step, key: int | None
    ) -> None:
        """Steps weight and states (C, ...), for the rows that the factors cover.

        key: of :func:`fastmargin.rounding.narrowed`.
        """
        raise NotImplementedError

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``Optimizer.zero_grad``; also drops stored factors."""
        if self.fused:
            for parameter in self._parameters():
                factors.clear(parameter)
        super().zero_grad(set_to_none)

    def _ready(self, parameter: Tensor, state: dict[str, Any], unsampled: str) -> OwedSteps | None:
        """The table of this parameter's missed steps, with room for one more; None if frozen."""
        owed = self._owed.get(parameter)
        if deferred.debt_of(parameter) is not owed or unsampled == "frozen":
            # pending updates of another optimiser, such as a deleted one, or from before the mode
            # changed
            deferred.settle(parameter)
        if unsampled == "frozen":
            self._owed.pop(parameter, None)
            state.pop("last_step", None)
            return None
        if owed is None:
            now = int(state["step"])
            rows = as_rows(parameter).shape[:1]
            state["last_step"] = torch.full(rows, now, dtype=torch.int32, device=parameter.device)
            rounding = self._rounding(parameter)
            owed = OwedSteps(self._step_type, self._row_states, state, now, rounding)
            self._owed[parameter] = owed
        elif owed.full:
            owed.settle(parameter)
        return owed

    # ---- saving, loading, copying ---------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As ``Optimizer.state_dict``, with all rows brought up to date first.

        This changes the parameters' values, so save them afterwards, or settle them before.
        """
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``Optimizer.load_state_dict``; also accepts what torch's SGD or AdamW saved.

        ``unsampled`` is not loaded. Pending updates are applied first.

        Raises:
            ValueError: invalid options, or a state of another shape than its parameter.
        """
        # registered last, so that it sees the state after the user's hooks
        hook = self.register_load_state_dict_pre_hook(RowOptimizer._before_load)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def _before_load(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Checks a state, and converts it to one that the base class does not alter."""
        saved_groups = state_dict["param_groups"]
        if [len(group["params"]) for group in saved_groups] != [
            len(group["params"]) for group in self.param_groups
        ]:
            return state_dict  # which the base class refuses
        groups, state = [], dict(state_dict["state"])
        for own, saved in zip(self.param_groups, saved_groups, strict=True):
            options = {name: own[name] for name in self.defaults if name in own}
            group = {**options, **saved, "unsampled": own["unsampled"]}
            self._check_group(group)
            groups.append(group)
            for key, parameter in zip(saved["params"], own["params"], strict=True):
                if key in state:
                    state[key] = self._loadable(state[key], parameter)
        self.settle()
        return {**state_dict, "state": state, "param_groups": groups}

    def _loadable(self, saved: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """State of one parameter without what a settled state does not need."""
        loadable = {"step": torch.tensor(float(saved.get("step", 0.0)))}
        for name in self._row_states:
            tensor = saved.get(name)
            if tensor is None:
                continue
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, its parameter "
                    f"{tuple(parameter.shape)}; load the state of these rows"
                )
            dtype = self._state_dtype(parameter)
            loadable[name] = _Opaque(tensor.to(device=parameter.device, dtype=dtype))
        return loadable

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_owed", "fused", "rounding")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the end of ``load_state_dict``; a loaded state has no pending updates."""
        self._owed = {}
        super().__setstate__(state)
        for group in self.param_groups:
            for parameter in group["params"]:
                saved = self.state.get(parameter, {})
                for name in self._row_states:
                    if isinstance(saved.get(name), _Opaque):
                        saved[name] = saved[name].tensor
        for parameter, owed in self._owed.items():
            if owed.owing:
                deferred.owe(parameter, owed)
        self._keep()


def _check_grad(grad: Tensor | None) -> None:
    if grad is not None and grad.is_sparse and grad.sparse_dim() != 1:
        raise ValueError(
            f"a sparse gradient must have one sparse dimension, its rows, got {grad.sparse_dim()}"
        )


def _update_sparse(
    tensors: list[Tensor],
    grad: Tensor,
    step: Step,
    dtype: torch.dtype,
    owed: OwedSteps | None,
    key: int | None,
) -> None:
    """Steps the rows of a sparse gradient, pending updates first: weight and states (C, ...)."""
    last_step = [] if owed is None else [owed.state["last_step"]]
    for ids, values, unfinished in merged_rows(grad, dtype):
        end = ids[-1:]
        before = [] if unfinished is None else [t.index_select(0, end) for t in tensors + last_step]
        rows = gather(tensors, ids, dtype)
        if owed is not None and owed.owing:
            owed.catch_up(owed.state["last_step"].index_select(0, ids), rows)
        step.update(*rows, values)
        scatter(tensors, ids, rows, key)
        if owed is not None:
            owed.state["last_step"].index_fill_(0, ids, owed.now + 1)
        for tensor, old in zip(tensors + last_step, before, strict=False):
            # a row whose sum continues in the next chunk is restored, and stepped there
            new = tensor.index_select(0, end)
            tensor.index_copy_(0, end, torch.where(unfinished, old, new))


def _note_step(owed: OwedSteps, index: Tensor) -> None:
    """The rows ``index`` (K,), settled before, have taken the next step; -1: padding slot."""
    last_step = owed.state["last_step"]
    if index.shape[0] and last_step.shape[0]:
        place, some = stand_ins(index, last_step.shape[0])
        ids = torch.where(some, index[place], 0)
        last_step.index_copy_(0, ids, torch.where(some, owed.now + 1, last_step[ids]).int())
