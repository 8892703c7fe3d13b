"""Sees what watches an optimizer's step, and calls torch's fused Adam kernels without `Optimizer.step`.

Where a private name is missing the answers are the careful ones: somebody may watch, and there is no kernel. Optimizers
then take their own steps, which give the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from disttrain.torch_internals.access import check, choose, private, reader, small_tensor


def may_set_grad_scale(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel divides gradients by its attribute `grad_scale`, and no hook sees them before."""
    return _supports_grad_scale()(optimizer)


@cache
def _supports_grad_scale() -> Callable[[Optimizer], bool]:
    def probed() -> Callable[[Optimizer], bool]:
        hooks, name = _Hooks(), "_step_supports_amp_scaling"
        check(private(SGD([small_tensor(1.0)], lr=0.1, fused=True), name) is True, name)
        return lambda optimizer: private(optimizer, name, False) is True and not hooks.before(optimizer)

    return choose("torch.optim.Optimizer._step_supports_amp_scaling", lambda optimizer: False, probed)


class _Hooks:
    """Reads the hooks around an optimizer's step. Raises where torch keeps them elsewhere."""

    def __init__(self) -> None:
        self._before, self._after = reader("_optimizer_step_pre_hooks"), reader("_optimizer_step_post_hooks")
        self._all_before = private("torch.optim.optimizer", "_global_optimizer_pre_hooks")
        self._all_after = private("torch.optim.optimizer", "_global_optimizer_post_hooks")
        optimizer, nothing = SGD([small_tensor(1.0)], lr=0.1), lambda *_: None
        for register, hooks in (
            (optimizer.register_step_pre_hook, self._before(optimizer)),
            (optimizer.register_step_post_hook, self._after(optimizer)),
            (register_optimizer_step_pre_hook, self._all_before),
            (register_optimizer_step_post_hook, self._all_after),
        ):
            count = len(hooks)
            handle = register(nothing)
            found = len(hooks)
            handle.remove()
            check((found, len(hooks)) == (count + 1, count), register.__name__)

    def before(self, optimizer: Optimizer) -> bool:
        """Whether any hook runs before this optimizer's step."""
        return bool(self._before(optimizer) or self._all_before)

    def any(self, optimizer: Optimizer) -> bool:
        """Whether any hook runs around this optimizer's step."""
        return bool(self._before(optimizer) or self._after(optimizer) or self._all_before or self._all_after)


@cache
def fused_adam() -> FusedAdamKernels | None:
    """Return torch's fused Adam kernels, or None where the optimizer must take its own steps. Local."""
    return choose("torch._fused_adam_", None, FusedAdamKernels)


class FusedAdamKernels:
    """torch's fused kernels of Adam and AdamW, and the signs that `Optimizer.step` would do no more than call them.

    Raises where this torch lacks one of them.
    """

    def __init__(self) -> None:
        self._adam, self._adamw = private(torch, "_fused_adam_"), private(torch, "_fused_adamw_")
        self._add = private(torch, "_foreach_add_")
        self._is_profiled: Callable[[], bool] = private("torch._C._autograd", "_profiler_enabled")
        self._hooks = _Hooks()
        # The code of the wrapper that the first object of a class puts around the class's step, and what it wraps.
        self._wrapper = Optimizer.profile_hook_step(lambda *_: None).__code__
        step: Any = Adam.step
        self._plain_step = step.__wrapped__ if step.__code__ is self._wrapper else step
        source = Path(self._plain_step.__code__.co_filename)
        check(source.parent == Path(torch.optim.__file__).parent, "Adam.step")
        check(self._is_profiled() in (True, False), "_profiler_enabled")
        self._check_kernels()
        self._check_schedule()

    def is_watched(self, optimizer: Optimizer) -> bool:
        """Whether anything but the kernel would happen in `optimizer.step`: another class, a hook, a profiler."""
        step = type(optimizer).step
        return bool(
            type(optimizer) not in (Adam, AdamW)
            or getattr(step, "__code__", None) is not self._wrapper
            or getattr(step, "__wrapped__", None) is not self._plain_step
            or self._hooks.any(optimizer)
            or self._is_profiled()
        )

    def is_of_schedule(self, step: Any) -> bool:
        """Whether `step` is the class's, in the wrapper by which a schedule learns of its calls (LRScheduler)."""
        inner = getattr(step, "__wrapped__", None)
        is_wrapper: bool = private(step, "_wrapped_by_lr_sched", False)
        return is_wrapper and getattr(inner, "__wrapped__", None) is self._plain_step

    def note_call(self, optimizer: Optimizer) -> None:
        """Notify schedules that the optimizer has stepped, as its wrapped `step` does."""
        optimizer._opt_called = True  # type: ignore[attr-defined]

    def step(
        self, settings: Mapping[str, Any], tensors: Sequence[Sequence[Tensor]], divisor: Tensor | None, decoupled: bool
    ) -> None:
        """Step one parameter group, in place.

        Args:
            settings: the group's settings, among them `lr` and `betas`.
            tensors: parameters, gradients, first moments, second moments and step counts, all local tensors.
            divisor: what gradients are divided by first, a 0-d float32 tensor on their device, or None.
            decoupled: whether weight decay is AdamW's.
        """
        parameters, gradients, averages, squares, steps = tensors
        # On a CPU torch creates a tensor of the number for every step count. On a GPU reading a tensor waits.
        self._add(steps, torch.ones(()) if steps[0].is_cpu else 1)
        beta1, beta2 = settings["betas"]
        (self._adamw if decoupled else self._adam)(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            lr=settings["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            amsgrad=False,
            maximize=settings["maximize"],
            grad_scale=divisor,
            found_inf=None,
        )

    def _check_kernels(self) -> None:
        """Compare a step of each kernel with torch's formula. No optimizer steps, or global hooks would see it."""
        settings: dict[str, Any] = {
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "weight_decay": 0.1,
            "eps": 1e-8,
            "maximize": False,
        }
        formulas: tuple[Callable[..., None], ...] = (adam, adamw)
        for decoupled, formula in enumerate(formulas):
            tensors = [[small_tensor(*pair)] for pair in ((1.0, -2.0), (0.6, 0.8), (0.1, 0.2), (0.3, 0.4))]
            expected = [[one.clone() for one in row] for row in tensors]
            steps, expected_steps = [small_tensor(1.0)[0]], [small_tensor(1.0)[0]]
            self.step(settings, [*tensors, steps], small_tensor(2.0)[0], bool(decoupled))
            expected[1][0] /= 2.0
            plain = {key: value for key, value in settings.items() if key != "betas"}
            plain |= {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "foreach": False}
            formula(*expected, [], expected_steps, **plain)
            close = [torch.allclose(tensors[k][0], expected[k][0], rtol=1e-5) for k in (0, 2, 3)]
            check(all(close) and torch.equal(steps[0], expected_steps[0]), "_fused_adam_")

    def _check_schedule(self) -> None:
        """A schedule marks the optimizer's step, and accepts `note_call` for a call of it."""
        optimizer = SGD([small_tensor(1.0)], lr=0.1)
        schedule = LambdaLR(optimizer, lambda _: 1.0)
        check(private(optimizer.step, "_wrapped_by_lr_sched") is True, "_wrapped_by_lr_sched")
        self.note_call(optimizer)
        check(private(optimizer, "_opt_called") is True, "_opt_called")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()
