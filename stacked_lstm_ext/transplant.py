"""One module's state under another class: what ``from_torch``, ``to_torch`` and the converters share."""

from __future__ import annotations

import copy
import types
import weakref
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["both", "obstacle_to_replacing", "only_adds_a_constructor", "original_class", "transplant"]

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

# Options of a StackedLSTM that decide what it computes. They go along if the new module is a StackedLSTM, too.
_OWN_MEANING = ("link", "return_sequences")
# Attributes of a StackedLSTM that an nn.LSTM does not have.
_OWN_OPTIONS = (*_OWN_MEANING, "recompute", "bf16_weights", "_frozen", "_kept_options", "_call_way", "_step_way", "__module__")

# Names that every class body has, and names that cannot change how the module computes.
_HARMLESS_ATTRIBUTES = frozenset(
    {
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
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
        "__type_params__",
        "__weakref__",
        "_abc_impl",
        "_call_way",
        "_overrides_weights",
        "_step_way",
    }
)

# Names that decide how a module is called or copied. If a subclass defines one, no other class can take over its behaviour.
_NOT_CARRIED = frozenset(
    {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__reduce__", "__reduce_ex__", "recompute", "bf16_weights", *_OWN_MEANING}
)

# The attribute in which a class made by both() keeps the class that it was made for.
_MADE_FOR = "_made_for"


def original_class(module: nn.RNNBase) -> type[nn.RNNBase]:
    """The class of ``module`` before parametrizations or :func:`both` replaced it."""
    bare: type[nn.RNNBase] = parametrize.type_before_parametrizations(module)
    made_for: type[nn.RNNBase] = vars(bare).get(_MADE_FOR, bare)
    return made_for


def _added(cls: type[nn.RNNBase], known: type[nn.RNNBase]) -> dict[str, type]:
    """The attributes that ``cls`` and its bases before ``known`` define, except the harmless ones, each with the class that defines it."""
    added: dict[str, type] = {}
    for base in cls.__mro__[: cls.__mro__.index(known)]:
        if not issubclass(known, base):
            added.update({name: base for name in vars(base) if name not in _HARMLESS_ATTRIBUTES and name not in added})
    return added


def only_adds_a_constructor(cls: type[nn.RNNBase], known: type[nn.RNNBase]) -> bool:
    return not _added(cls, known)


def obstacle_to_replacing(module: nn.RNNBase, known: type[nn.RNNBase], *, carry: type[nn.RNNBase] | None = None) -> str:
    """Why ``module`` cannot become another class without losing behaviour, in words; empty if it can.

    Args:
        known: the class that is replaced. Without ``carry``, what a subclass adds to it, except a constructor, is lost.
        carry: the class that the module is to become. What a subclass adds is kept if a class can be made that is both
            (:func:`both`).
    """
    if module._compiled_call_impl is not None:
        return "it was compiled by Module.compile(); convert first, compile then"
    if "forward" in vars(module):
        return "it has a forward of its own set on the instance"
    cls = original_class(module)
    was_made = cls is not parametrize.type_before_parametrizations(module)
    if not issubclass(cls, known):
        return "" if was_made else f"{_name(cls)} is not a {_name(known)}"
    added = _added(cls, known)
    if carry is None:
        if "forward" in added:
            return f"{_name(cls)} overrides forward"
        return f"{_name(cls)} defines {', '.join(sorted(added))}, which would be lost" if added else ""
    taken = {name for name in dir(carry) if name.startswith("_") and not name.startswith("__") and not hasattr(known, name)}
    for name in sorted(added):
        if name in _NOT_CARRIED:
            return f"{_name(cls)} overrides {name}"
        if name in taken:
            return f"{_name(cls)} defines {name}, which {carry.__name__} needs for itself"
    for name in sorted(vars(module)) if not was_made else ():
        if name in taken or name in _OWN_OPTIONS:
            return f"its attribute {name} is one that {carry.__name__} needs for itself"
    if added:
        try:
            both(cls, carry)
        except Exception as error:  # the metaclass and __init_subclass__ are the subclass's, and may raise anything
            return f"no class can be made that is a {_name(cls)} as well: {error}"
    return ""


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def both(cls: type[nn.RNNBase], stacked: type[Target]) -> type[Target]:
    """A subclass of ``cls`` that keeps all that ``cls`` defines and computes as ``stacked``, which is an ``nn.LSTM`` itself.

    In its method resolution order, ``stacked`` comes between ``cls`` and ``nn.LSTM``, so ``super()`` in ``cls`` finds
    ``stacked``. Modules of such a class can be copied and pickled: the class is then made again from ``cls``.
    """
    for known in cls.__subclasses__():
        if vars(known).get(_MADE_FOR) is cls and issubclass(known, stacked):
            return known
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": f"Stacked{cls.__qualname__}",
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
    }
    made: Any = types.new_class(f"Stacked{cls.__name__}", (cls, stacked), exec_body=lambda body: body.update(namespace))
    setattr(made, _MADE_FOR, cls)  # only now: the loop above must not find a class whose __init_subclass__ raised
    made._note_overrides()  # for the case that __init_subclass__ of cls does not call that of its bases
    result: type[Target] = made
    return result


def _reduce(module: Any, protocol: int) -> Any:
    made = type(module)
    if _MADE_FOR not in vars(made):
        return object.__reduce_ex__(module, protocol)
    (stacked,) = made.__bases__[1:]
    return _made_again, (vars(made)[_MADE_FOR], stacked), module.__getstate__()


def _made_again(cls: type[nn.RNNBase], stacked: type[nn.RNNBase]) -> nn.RNNBase:
    made = both(cls, stacked)
    return object.__new__(made)


def transplant(source: nn.RNNBase, target: type[Target], *, options: dict[str, Any], take_hooks: bool) -> Target:
    """A module of class ``target`` with everything that ``source`` has; it shares the very same ``Parameter`` objects.

    Parametrizations and hooks stay in force, also those of ``torch.nn.utils.weight_norm`` and ``prune``.

    Args:
        options: attributes to set on the new module: those of ``target`` that ``nn.LSTM`` does not have, and those that
            ``nn.LSTM`` has in another form.
        take_hooks: whether the new module takes the place of ``source``. It then gets the hook dictionaries
            themselves, so that a handle returned earlier still removes its hook; otherwise it gets copies of them.
    """
    cls = target
    if parametrize.is_parametrized(source):
        # torch gives a parametrized module a class of its own, whose properties compute the tensors.
        own = {key: value for key, value in vars(type(source)).items() if key not in ("__dict__", "__weakref__")}
        # The new class gets its own ones of these.
        own = {key: value for key, value in own.items() if key not in ("_call_way", "_overrides_weights", "_step_way")}
        cls = types.new_class(f"Parametrized{target.__name__}", (target,), exec_body=lambda body: body.update(own))
    module: Target = object.__new__(cls)
    state = dict(source.__dict__)
    for key, value in state.items():
        is_hooks = "_hooks" in key and isinstance(value, dict)
        if key in _OWN_CONTAINERS or (is_hooks and not take_hooks):
            state[key] = copy.copy(value)
        elif isinstance(value, types.MethodType) and value.__self__ is source:
            state[key] = types.MethodType(value.__func__, module)  # a method that was set on the instance
    for name in _OWN_OPTIONS:
        if name not in _OWN_MEANING or not hasattr(target, name):
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
    look_again = getattr(module, "_look_again", None)
    if look_again is not None:
        look_again()
    return module


def _shallow_copy(container: nn.Module) -> nn.Module:
    """A container with the same contents. Adding to the copy, or removing from it, does not change the original."""
    twin = copy.copy(container)
    for key in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[key] = copy.copy(container.__dict__[key])
    return twin


def _rebind_hooks(module: nn.Module, source: nn.Module) -> None:
    """Bind to ``module`` those hooks that hold ``source``: hooks of ``load_state_dict``, and methods of ``source``."""
    for key, hooks in module.__dict__.items():
        if "_hooks" not in key or not isinstance(hooks, dict):
            continue
        for number, hook in list(hooks.items()):
            if getattr(hook, "with_module", False) is True and hook.module() is source:
                hooks[number] = copy.copy(hook)
                hooks[number].module = weakref.ref(module)
            elif isinstance(hook, types.MethodType) and hook.__self__ is source:
                hooks[number] = types.MethodType(hook.__func__, module)
