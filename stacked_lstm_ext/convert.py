"""Swap the LSTMs inside a model: :func:`convert_lstm`, its inverse :func:`revert_lstm`, and :func:`lstm_report`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import nn

from .module import StackedLSTM, TorchStackedLSTM, in_one_size, obstacle_to_one_size, stacked_class, torch_class
from .transplant import obstacle_to_replacing, transplant

__all__ = ["LSTMReport", "ReportedLSTM", "convert_lstm", "lstm_report", "revert_lstm"]


Model = TypeVar("Model", bound=nn.Module)
Skip = str | type | Iterable[str | type] | Callable[[str, nn.Module], bool]


class ReportedLSTM(NamedTuple):
    """One LSTM of a model.

    Attributes:
        paths: where it is in the model; several if it is shared, and ``""`` if it is the model itself.
        cls: the name of its class.
        status: ``"converted"`` (it is a :class:`.StackedLSTM`), ``"convertible"``, ``"skipped"`` or ``"refused"``.
        reason: why, in words; empty if it is convertible.
    """

    paths: tuple[str, ...]
    cls: str
    status: str
    reason: str

    def __str__(self) -> str:
        where = ", ".join(path or "(the model itself)" for path in self.paths)
        return f"{where}: {self.cls}, {self.status}" + (f": {self.reason}" if self.reason else "")


class LSTMReport(tuple[ReportedLSTM, ...]):
    """What :func:`lstm_report` found, in the order of the model; ``print`` it."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no LSTM"

    def of(self, status: str) -> tuple[ReportedLSTM, ...]:
        """The LSTMs of this status."""
        return tuple(entry for entry in self if entry.status == status)


@overload
def convert_lstm(
    model: nn.LSTM, *, skip: Skip = (), as_lstm: bool = False, recompute: bool = False, bf16_weights: bool = False
) -> StackedLSTM: ...
@overload
def convert_lstm(model: Model, *, skip: Skip = (), as_lstm: bool = False, recompute: bool = False, bf16_weights: bool = False) -> Model: ...
def convert_lstm(
    model: nn.Module, *, skip: Skip = (), as_lstm: bool = False, recompute: bool = False, bf16_weights: bool = False
) -> nn.Module:
    """Swap every ``torch.nn.LSTM`` inside ``model`` for a :class:`.StackedLSTM`, in place.

    The parameters stay the very same objects, so optimisers, tied weights and ``state_dict`` keys go on working.
    Hooks of every kind, parametrizations, both weight norms, pruning and training flags stay too; a module that several
    places share stays shared. Call this function before ``torch.compile``, ``DistributedDataParallel`` and the like.
    :func:`lstm_report` says what becomes of each LSTM, before and after.

    An LSTM whose class only adds a constructor to ``nn.LSTM`` becomes a ``StackedLSTM``. A class that adds more (helper
    methods, ``reset_parameters``, overridden checks, a mixin) is kept: its LSTMs get a class made at run time that is
    both, so they are ``nn.LSTM`` by ``isinstance`` as with ``as_lstm``.

    Args:
        model: any module.
        skip: the LSTMs to leave as they are: paths (of an LSTM, or of a module that contains it), classes, or a
            function of path and module that returns whether to skip. A single path or class need not be in a list. A
            shared module is skipped if one of its paths is.
        as_lstm: whether the new modules are to be ``nn.LSTM`` by ``isinstance`` as well, for code that checks this.
            ``torch.compile`` breaks the graph at such modules, as it does at ``nn.LSTM``.
        recompute: the saving mode of the new modules, as for :class:`.StackedLSTM`.
        bf16_weights: whether their products use rounded weights, as for :class:`.StackedLSTM`.

    Returns:
        ``model`` itself, or the new module when ``model`` is an ``nn.LSTM``.

    Warns:
        UserWarning: for LSTMs that ``torch.jit`` has compiled: they stay as they are. ``skip`` silences it.

    Raises:
        TypeError: for LSTMs that cannot be converted: the class overrides ``forward``, the LSTM is compiled, or it uses
            a name that a ``StackedLSTM`` needs. The message names all paths with the reasons, and nothing has been
            changed. Also for a ``model`` that is not a module and a ``skip`` of another type.
        ValueError: for a path in ``skip`` that the model does not have.
    """
    for name, option in (("as_lstm", as_lstm), ("recompute", recompute), ("bf16_weights", bf16_weights)):
        if not isinstance(option, bool):
            raise TypeError(f"{name} should be of type bool, got: {type(option).__name__}")
    report = _examine(model, skip)
    refused = [entry for module, entry in report if entry.status == "refused" and isinstance(module, nn.LSTM)]
    if refused:
        listed = "".join(f"\n  at {_where(entry)}: {entry.reason}" for entry in refused)
        paths = [entry.paths[0] for entry in refused]
        raise TypeError(f"cannot replace {len(refused)} of the LSTMs; nothing was changed (skip={paths} leaves them as they are):{listed}")
    scripted = [entry for _, entry in report if entry.status == "refused"]
    if scripted:
        listed = "; ".join(f"{_where(entry)}: {entry.reason}" for entry in scripted)
        warnings.warn(f"{len(scripted)} LSTMs stay as they are (skip silences this): {listed}", stacklevel=2)
    options = {"recompute": recompute, "bf16_weights": bf16_weights}
    found = [module for module, entry in report if isinstance(module, nn.LSTM) and entry.status == "convertible"]
    targets = [stacked_class(lstm, as_lstm=as_lstm) for lstm in found]
    made = {id(lstm): transplant(lstm, cls, options=options, take_hooks=True) for lstm, cls in zip(found, targets, strict=True)}
    return _swap(model, made)


def lstm_report(model: nn.Module, *, skip: Skip = ()) -> LSTMReport:
    """What :func:`convert_lstm` would do, or has done, with each LSTM of ``model``, and why; nothing is changed.

    Args:
        model: any module.
        skip: as for :func:`convert_lstm`.

    Returns:
        a tuple of :class:`ReportedLSTM`, one for each ``nn.LSTM``, :class:`.StackedLSTM` and LSTM that ``torch.jit``
        has compiled.

    Raises:
        TypeError: for a ``model`` that is not a module and a ``skip`` of another type.
        ValueError: for a path in ``skip`` that the model does not have.
    """
    return LSTMReport(entry for _, entry in _examine(model, skip))


@overload
def revert_lstm(model: StackedLSTM) -> nn.LSTM: ...
@overload
def revert_lstm(model: Model) -> Model: ...
def revert_lstm(model: nn.Module) -> nn.Module:
    """Swap every :class:`.StackedLSTM` inside ``model`` for a ``torch.nn.LSTM``, in place: undo :func:`convert_lstm`.

    Everything that :func:`convert_lstm` keeps stays. An LSTM whose class :func:`convert_lstm` made gets back its own
    class. The settings that ``nn.LSTM`` lacks (``recompute``, ``bf16_weights``) are lost.

    Returns:
        ``model`` itself, or the new module when ``model`` is a ``StackedLSTM``.

    Raises:
        TypeError: for a subclass of ``StackedLSTM`` that overrides ``forward``, or that defines anything else beside a
            constructor, and for layers with sizes or rates that differ; the path inside the model is named, and nothing has
            been changed.
    """
    found = {module: paths for module, paths in _modules(model).items() if isinstance(module, StackedLSTM)}
    for module, paths in found.items():
        obstacle = obstacle_to_replacing(module, StackedLSTM) or obstacle_to_one_size(module)
        if obstacle:
            raise TypeError(f"cannot replace the LSTM at '{paths[0] or '(the model itself)'}': {obstacle}")
    made = {id(stacked): transplant(stacked, torch_class(stacked), options=in_one_size(stacked), take_hooks=True) for stacked in found}
    return _swap(model, made)


def _modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module inside ``model``, and its paths."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def _examine(model: nn.Module, skip: Skip) -> list[tuple[nn.Module, ReportedLSTM]]:
    modules = _modules(model)
    skipped = _skipper(skip, {path for paths in modules.values() for path in paths})
    found = []
    for module, paths in modules.items():
        scripted = _is_scripted_lstm(module)
        if not scripted and not isinstance(module, (nn.LSTM, StackedLSTM)):
            continue
        kind = type(module)
        cls = f"{getattr(module, 'original_name', '')} ({kind.__name__})" if scripted else f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(module, StackedLSTM):
            obstacle = obstacle_to_one_size(module)
            verdict = "converted", "it is a StackedLSTM" + (f", which cannot be reverted: {obstacle}" if obstacle else "")
        elif any(skipped(path, module) for path in paths):
            verdict = "skipped", "skip says so"
        elif scripted:
            verdict = "refused", "torch.jit has compiled it: convert the model that it was made from, and use torch.export"
        elif any(path.rpartition(".")[2] == "_orig_mod" for path in paths):
            verdict = "refused", "torch.compile has wrapped it: convert first, compile then"
        else:
            assert isinstance(module, nn.LSTM)
            obstacle = obstacle_to_replacing(module, nn.LSTM, carry=TorchStackedLSTM)
            verdict = ("refused", obstacle) if obstacle else ("convertible", "")
        found.append((module, ReportedLSTM(tuple(paths), cls, *verdict)))
    return found


def _is_scripted_lstm(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.LSTM, or of a subclass, that was scripted, traced or loaded. Its class is then one of torch.jit's."""
    weight = getattr(module, "weight_hh_l0", None) if isinstance(module, torch.jit.ScriptModule) else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return False
    return hasattr(module, "weight_hr_l0") or weight.size(0) == 4 * weight.size(1)  # four gates: a GRU has three


def _skipper(skip: Skip, known: set[str]) -> Callable[[str, nn.Module], bool]:
    """``skip`` as a function of path and module."""
    if callable(skip) and not isinstance(skip, type):
        return skip
    entries = (skip,) if isinstance(skip, (str, type)) else tuple(skip) if isinstance(skip, Iterable) else (skip,)
    for entry in entries:
        if not isinstance(entry, (str, type)):
            raise TypeError(f"skip should be paths, classes, or a function of path and module, got: {type(entry).__name__}")
        if isinstance(entry, str) and entry not in known:
            raise ValueError(f"skip names {entry!r}, and the model has no module there")
    classes = tuple(entry for entry in entries if isinstance(entry, type))
    paths = {entry for entry in entries if isinstance(entry, str)}

    def skipped(path: str, module: nn.Module) -> bool:
        return isinstance(module, classes) or any(path == entry or not entry or path.startswith(f"{entry}.") for entry in paths)

    return skipped


def _where(entry: ReportedLSTM) -> str:
    return f"'{entry.paths[0] or '(the model itself)'}'"


def _swap(model: nn.Module, replacement: dict[int, Any]) -> nn.Module:
    """Put each replacement in every place of the module that it replaces."""
    # An LSTM may contain modules itself (parametrizations), so the replacements are searched as well.
    for parent in [*model.modules(), *replacement.values()]:
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    result: nn.Module = replacement.get(id(model), model)
    return result
