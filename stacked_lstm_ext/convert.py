"""Swap the LSTMs inside a model: :func:`convert_lstm` and its inverse :func:`revert_lstm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch import nn

from .module import StackedLSTM
from .transplant import obstacle_to_replacing, transplant

__all__ = ["convert_lstm", "revert_lstm"]


Model = TypeVar("Model", bound=nn.Module)


@overload
def convert_lstm(model: nn.LSTM, *, recompute: bool = False, bf16_weights: bool = False) -> StackedLSTM: ...
@overload
def convert_lstm(model: Model, *, recompute: bool = False, bf16_weights: bool = False) -> Model: ...
def convert_lstm(model: nn.Module, *, recompute: bool = False, bf16_weights: bool = False) -> nn.Module:
    """Swap every ``torch.nn.LSTM`` inside ``model`` for a :class:`.StackedLSTM`, in place.

    The parameters stay the very same objects, so optimisers, tied weights and ``state_dict`` keys go on working.
    Hooks of every kind, parametrizations, both weight norms, pruning and training flags stay too; a module that
    stands in several places is one module afterwards as well. Call it before ``torch.compile``,
    ``DistributedDataParallel`` and the like.

    Args:
        model: any module.
        recompute: the saving mode of the new modules, as for :class:`.StackedLSTM`.
        bf16_weights: whether their products see rounded weights, as for :class:`.StackedLSTM`.

    Returns:
        ``model`` itself, or the new module when ``model`` is an ``nn.LSTM``.

    Raises:
        TypeError: for a subclass of ``nn.LSTM`` that overrides ``forward``, or that defines anything else beside a
            constructor; its path inside the model is named, and nothing has been changed.
    """
    options = {"recompute": recompute, "bf16_weights": bf16_weights}
    return _swap(model, nn.LSTM, lambda lstm: transplant(lstm, StackedLSTM, options=options, take_hooks=True))


@overload
def revert_lstm(model: StackedLSTM) -> nn.LSTM: ...
@overload
def revert_lstm(model: Model) -> Model: ...
def revert_lstm(model: nn.Module) -> nn.Module:
    """Swap every :class:`.StackedLSTM` inside ``model`` for a ``torch.nn.LSTM``, in place: undo :func:`convert_lstm`.

    Everything stays that :func:`convert_lstm` keeps. The settings that ``nn.LSTM`` lacks
    (``recompute``, ``bf16_weights``) are lost.

    Returns:
        ``model`` itself, or the new module when ``model`` is a ``StackedLSTM``.

    Raises:
        TypeError: for a subclass of ``StackedLSTM`` that overrides ``forward``, or that defines anything else beside a
            constructor; its path inside the model is named, and nothing has been changed.
    """
    return _swap(model, StackedLSTM, lambda stacked: transplant(stacked, nn.LSTM, options={}, take_hooks=True))


def _swap(model: nn.Module, known: type[nn.RNNBase], make: Callable[[Any], nn.RNNBase]) -> nn.Module:
    """Replace every ``known`` inside ``model`` by what ``make`` makes of it: all of them or, if one refuses, none."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    found = {path: module for path, module in model.named_modules() if isinstance(module, known)}
    for path, module in found.items():
        obstacle = obstacle_to_replacing(module, known)
        if obstacle:
            raise TypeError(f"cannot replace the LSTM at '{path or '(the model itself)'}': {obstacle}")
    replacement = {id(module): make(module) for module in found.values()}
    # An LSTM may itself hold modules (parametrizations), so the new ones are looked through as well.
    for parent in [*model.modules(), *replacement.values()]:
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacement:
                parent._modules[name] = replacement[id(child)]
    return replacement.get(id(model), model)
