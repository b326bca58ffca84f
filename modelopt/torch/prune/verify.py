"""Proof that a pruned model computes what the dense model computes with the removed entries dead.

    D = the dense model in float64, its removed entries dead: zero, and absent from every mean, variance and norm (`live.py`)
    P = the pruned model, holding the same values          exact  <=>  max|P(x) - D(x)| <= tolerance * max|D(x)|

It knows nothing of the pruner, only which entries survived. All parameters get noise first, so that the statement holds for the
structure and not for values that happen to be 0 or 1. A second trial has more noise and smooth activations in both models, since
a unit that ReLU has switched off would hide its mistakes; it counts unless it overflows. Families are proven by themselves: a
permutation of the atoms of a family, in every tensor that it reaches, must leave D's outputs as they are.

The models are not touched: copies of them run, on the CPU. Memory: two copies in float64 (8 bytes for each entry of the dense and
of the pruned model), a byte for each entry of a tensor with dead entries, and the activations.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelopt.core.errors import ConfigError
from modelopt.torch.prune.compare import difference, outputs_of, results
from modelopt.torch.prune.live import Float64Mode, LiveMode
from modelopt.torch.prune.origins import Kept, OriginError, Origins, float64_copy, perturb
from modelopt.torch.prune.permute import permutation_error
from modelopt.torch.trace.inputs import MODEL_ERRORS, resolve_inputs

TOLERANCE = 1e-7
STRENGTHS = (1.0, 3.0)  # of the noise of each trial


@dataclass(frozen=True)
class VerifyReport:
    """The verdict. The errors are relative to the largest output; `where` is the first module whose output differs."""

    exact: bool
    error: float
    message: str
    permutation_error: float | None = None
    where: str | None = None
    checked: int = 0
    reduced: tuple[str, ...] = ()
    unknown_ops: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.exact

    def __str__(self) -> str:
        return f"{'exact' if self.exact else 'NOT EXACT'}: {self.message}"


def verify_pruning(
    dense: nn.Module,
    pruned: nn.Module | Callable[[nn.Module], nn.Module | None],
    families: Iterable[Any] | None = None,
    *,
    dummy_input: Any = None,
    kept: Kept | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    check_values: bool = True,
) -> VerifyReport:
    """Prove that pruning left the function of the live entries unchanged.

    Args:
        dense: the model before pruning.
        pruned: the model after pruning, together with `kept`; or the pruner itself, a function that takes a copy of `dense` and
            prunes it in place or returns the pruned model. It is given a copy whose entries are numbers, from which the survivors
            are read, and must not compute with them.
        families: families of dimensions (`Axes.families`), each proven by a permutation of its atoms. None: not proven.
        dummy_input: what the model is called with: a tensor, a tuple, a dict, or (args, kwargs). None: guessed from the model.
        kept: for each parameter and buffer name the surviving indices of each dimension (None: all), as `Axes.kept` gives them.
        tolerance: largest |P - D| over the largest |D|; the arithmetic is float64.
        check_values: also compare the values that a given pruned model holds with the dense model's (not after training).

    A model that fails is reported, not raised. Raises ConfigError for a pruned model without `kept`, TraceError for inputs that
    cannot be guessed.

    >>> dense = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> small = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> small[0].weight.data, small[0].bias.data = dense[0].weight.data[:3], dense[0].bias.data[:3]
    >>> small[2].weight.data, small[2].bias.data = dense[2].weight.data[:, :3], dense[2].bias.data
    >>> kept = {"0.weight": (range(3), None), "0.bias": (range(3),), "2.weight": (None, range(3))}
    >>> verify_pruning(dense, small, dummy_input=torch.randn(2, 4), kept=kept).exact
    True
    """
    if isinstance(pruned, nn.Module) and kept is None:
        raise ConfigError("A pruned model alone does not say which entries survived: pass kept=..., or the pruner as a function.")
    args, kwargs = resolve_inputs(dense, dummy_input)
    call = _Call(_lively(_float64((args, kwargs)), torch.Generator().manual_seed(seed)), seed)
    masked = float64_copy(dense)
    origins = Origins.of(masked)
    try:
        trial, numbers = _follow(masked, pruned, origins, kept, check_values)
    except OriginError as error:
        return VerifyReport(False, float("inf"), str(error))
    contradiction = origins.contradictions(trial, numbers)
    if contradiction:
        return VerifyReport(False, float("inf"), contradiction)
    dead, moved, culprit = origins.dead(numbers), None, None
    report = VerifyReport(True, 0.0, "")
    for trial_number, strength in enumerate(STRENGTHS):
        perturb(masked, seed + trial_number, strength)
        if families is not None and not trial_number:
            moved, culprit = permutation_error(masked, families, call.run, tolerance)
        origins.fill(trial, numbers)
        for tensor, mask in zip(origins.tensors, dead, strict=True):
            if mask is not None:
                tensor.data = tensor.data.masked_fill(mask, 0)
        marks = list(zip(origins.tensors, dead, strict=True))
        again = _compare(masked, trial, marks, call, tolerance, smooth=trial_number > 0)
        if not trial_number or (again.checked and (not again.exact or again.error > report.error)):
            report = again
        if not report.exact:
            break
    report = dataclasses.replace(report, permutation_error=moved)
    if culprit is not None:
        message = f"A permutation of the family {culprit} changes the outputs by {moved:.2g} of the largest. " + report.message
        report = dataclasses.replace(report, exact=False, message=message)
    return report


def _follow(
    masked: nn.Module, pruned: Any, origins: Origins, kept: Kept | None, check_values: bool
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a float64 copy of the pruned model and the numbers of its entries."""
    if isinstance(pruned, nn.Module):
        trial = float64_copy(pruned)
        numbers = origins.from_kept(trial, kept or {})
        if check_values:
            for name, tensor in trial.state_dict(keep_vars=True).items():
                if name in numbers and not torch.equal(tensor, origins.gather(numbers[name])):
                    raise OriginError(f"The values of {name} are not the entries of the dense model that were said to be kept.")
        return trial, numbers
    trial = copy.deepcopy(masked)
    origins.tag(trial)
    result = pruned(trial)
    trial = result if isinstance(result, nn.Module) else trial
    return trial, origins.read(trial)


@dataclass(frozen=True)
class _Call:
    """The call of a model in float64, with one seed for whatever is random in it."""

    inputs: Any
    seed: int

    def run(self, model: nn.Module, mode: AbstractContextManager[Any] | None = None) -> Any:
        args, kwargs = copy.deepcopy(self.inputs)
        model.train().eval()  # drops what some models derive from their parameters once and keep
        with _exact_arithmetic(), mode or Float64Mode(), torch.no_grad():
            torch.manual_seed(self.seed)
            return model(*args, **kwargs)


@contextmanager
def _exact_arithmetic() -> Any:
    """float64 as the default dtype, attention as plain products, no fused fast paths; the random state is put back."""
    default, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.set_default_dtype(torch.float64)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=[]), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


def _float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, Mapping):
        return {k: _float64(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        items = [_float64(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _lively(value: Any, generator: torch.Generator, name: str = "") -> Any:
    """Replace float inputs that are one value throughout (zeros, ones) by noise: they would hide wrong channels. Masks stay."""
    if isinstance(value, Tensor):
        constant = value.dtype == torch.float64 and value.numel() > 1 and bool((value == value.reshape(-1)[0]).all())
        if not constant or "mask" in name:
            return value
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    if isinstance(value, Mapping):
        return {k: _lively(v, generator, str(k)) for k, v in value.items()}
    if isinstance(value, tuple | list):
        items = [_lively(v, generator, name) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _compare(
    masked: nn.Module, trial: nn.Module, dead: list[tuple[Tensor, Tensor | None]], call: _Call, tolerance: float, smooth: bool
) -> VerifyReport:
    mode = LiveMode(smooth)
    for tensor, mask in dead:
        mode.mark(tensor, mask)
    try:
        wanted = outputs_of(call.run(masked, mode))
    except MODEL_ERRORS as error:
        return VerifyReport(False, float("inf"), f"The dense model does not run in float64: {_describe(error)}")
    try:
        got = outputs_of(call.run(trial, Float64Mode(smooth)))
    except MODEL_ERRORS as error:
        return VerifyReport(False, float("inf"), f"The pruned model does not run: {_describe(error)}")
    unknown = dict(mode.unknown)
    if not wanted:
        message = "Nothing is proven: no tensors are among the outputs (in tuples, lists, mappings and dataclasses)."
        return VerifyReport(False, float("inf"), message, unknown_ops=unknown)
    if wanted.keys() != got.keys():
        return VerifyReport(
            False, float("inf"), f"The outputs are {sorted(got)} instead of {sorted(wanted)}.", unknown_ops=unknown
        )
    whole = results(wanted)
    if not smooth and not any(bool((wanted[name].isfinite() & (wanted[name] != 0)).any()) for name in whole):
        message = "Nothing is proven: the outputs are empty, zero or not finite. Pass other inputs."
        return VerifyReport(False, float("inf"), message, unknown_ops=unknown)
    if not all(bool(wanted[name].isfinite().all()) for name in whole) and smooth:
        return VerifyReport(True, 0.0, "The outputs are not finite.", unknown_ops=unknown)
    worst, reduced = 0.0, []
    for name, tensor in wanted.items():
        error, smaller = difference(tensor, got[name], mode.dead(tensor))
        if smaller and name in whole:
            shapes = f"{tuple(got[name].shape)} instead of {tuple(tensor.shape)}"
            return VerifyReport(False, float("inf"), f"The output {name} is {shapes}.", unknown_ops=unknown)
        reduced += [name] if smaller else []
        worst = max(worst, error)
    if worst <= tolerance:
        message = f"{len(wanted)} outputs agree to {worst:.1e} of the largest value."
        return VerifyReport(True, worst, message, None, None, len(wanted), tuple(reduced), unknown)
    where = _first_difference(masked, trial, mode, call, tolerance, smooth)
    message = (
        f"The outputs differ by {worst:.2g} of the largest value{f'; the first module to differ is {where}' if where else ''}."
    )
    if unknown:
        message += f" Ops without a rule for dead entries: {', '.join(sorted(unknown))}."
    return VerifyReport(False, worst, message, None, where, len(wanted), tuple(reduced), unknown)


def _first_difference(
    masked: nn.Module, trial: nn.Module, mode: LiveMode, call: _Call, tolerance: float, smooth: bool
) -> str | None:
    """Return the first module, in the order in which calls end, whose output differs, and how."""
    seen: dict[tuple[str, int], dict[str, Tensor]] = {}
    found: list[str] = []

    def record(key: tuple[str, int], output: Any) -> None:
        seen[key] = {k: t.clone() for k, t in outputs_of(output).items()}

    def compare(key: tuple[str, int], output: Any) -> None:
        if found or key not in seen:
            return
        for name, tensor in outputs_of(output).items():
            other = seen[key].get(name)
            if other is None:
                continue
            error, _ = difference(tensor, other, mode.dead(tensor))
            if error > tolerance:
                shapes = f"{tuple(other.shape)} for {tuple(tensor.shape)}" if error == float("inf") else f"by {error:.2g}"
                found.append(f"{key[0] or 'the model itself'} ({shapes})")
                return

    with _watch(trial, record):
        call.run(trial, Float64Mode(smooth))
    with _watch(masked, compare):
        call.run(masked, mode)
    return found[0] if found else None


@contextmanager
def _watch(model: nn.Module, act: Callable[[tuple[str, int], Any], None]) -> Any:
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            act((name, counts[name]), output)

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe(error: BaseException) -> str:
    """Return the error with the innermost line of code that is neither torch's nor ours."""
    here = os.path.dirname(__file__)
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((here, os.path.dirname(torch.__file__)))
    ]
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
