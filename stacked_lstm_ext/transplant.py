"""One module's state under another class: what ``from_torch``, ``to_torch`` and the converters share."""

from __future__ import annotations

import copy
import weakref
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["obstacle_to_replacing", "transplant"]

Target = TypeVar("Target", bound=nn.RNNBase)

# The containers that belong to one module. Two modules that live on must not share them.
_OWN_CONTAINERS = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_flat_weights",
    "_flat_weights_names",
    "_all_weights",
)

# Attributes of a StackedLSTM that an nn.LSTM does not have.
_OWN_OPTIONS = ("recompute", "bf16_weights", "_frozen")

# What a class body holds by itself, and what cannot change how the module computes.
_HARMLESS_ATTRIBUTES = frozenset(
    {
        "__annotations__",
        "__constants__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__init__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__static_attributes__",
        "__weakref__",
    }
)


def obstacle_to_replacing(module: nn.RNNBase, known: type[nn.RNNBase]) -> str:
    """Why ``module`` cannot become another class without losing behaviour, in words; empty if it can.

    A subclass of ``known`` may add nothing but a constructor: whatever else it defines would be lost without a sign.
    """
    if module._compiled_call_impl is not None:
        return "it was compiled by Module.compile(); convert first, compile then"
    bare = parametrize.type_before_parametrizations(module)
    for cls in bare.__mro__:
        if cls is known:
            return ""
        if "forward" in vars(cls):
            return f"{_name(bare)} overrides forward"
        added = sorted(set(vars(cls)) - _HARMLESS_ATTRIBUTES)
        if added and not issubclass(known, cls):
            return f"{_name(bare)} defines {', '.join(added)}, which would be lost"
    return f"{_name(bare)} is not a {_name(known)}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def transplant(source: nn.RNNBase, target: type[Target], *, options: dict[str, bool], take_hooks: bool) -> Target:
    """A module of class ``target`` with everything that ``source`` has, down to the very same ``Parameter`` objects.

    Parametrizations stay in force, and so do hooks, those of ``torch.nn.utils.weight_norm`` and ``prune`` among them.

    Args:
        options: the attributes of ``target`` that ``nn.LSTM`` does not have, to set on the new module.
        take_hooks: whether the new module takes the place of ``source``. It then gets the hook dictionaries
            themselves, so that a handle returned earlier still removes its hook; otherwise it gets copies of them.
    """
    cls = target
    if parametrize.is_parametrized(source):
        # torch gives a parametrized module a class of its own, whose properties compute the tensors.
        own = {key: value for key, value in vars(type(source)).items() if key not in ("__dict__", "__weakref__")}
        cls = type(f"Parametrized{target.__name__}", (target,), own)
    module = cls.__new__(cls)
    state = dict(source.__dict__)
    for key, value in state.items():
        is_hooks = "_hooks" in key and isinstance(value, dict)
        if key in _OWN_CONTAINERS or (is_hooks and not take_hooks):
            state[key] = copy.copy(value)
    for name in _OWN_OPTIONS:
        state.pop(name, None)
    state.update(options)
    module.__dict__.update(state)
    parametrizations = source._modules.get("parametrizations")
    if parametrizations is not None:
        lists = _shallow_copy(parametrizations)
        lists._modules.update({name: _shallow_copy(steps) for name, steps in parametrizations.named_children()})
        module._modules["parametrizations"] = lists
    module._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in module._flat_weights]
    _rebind_hooks(module, source)
    return module


def _shallow_copy(container: nn.Module) -> nn.Module:
    """A container with the same contents, to which one may add, and from which one may remove, by itself."""
    twin = copy.copy(container)
    for key in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[key] = copy.copy(container.__dict__[key])
    return twin


def _rebind_hooks(module: nn.Module, source: nn.Module) -> None:
    """Hand ``module`` to those hooks that remember the module they were registered on (of ``load_state_dict``)."""
    for key, hooks in module.__dict__.items():
        if "_hooks" not in key or not isinstance(hooks, dict):
            continue
        for number, hook in hooks.items():
            if getattr(hook, "with_module", False) is True and hook.module() is source:
                hooks[number] = copy.copy(hook)
                hooks[number].module = weakref.ref(module)
