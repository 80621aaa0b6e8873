"""What a subclass or an instance of :class:`.StackedLSTM` may change that the fast paths of a call would ignore.

``torch.nn.LSTM`` calls its checks as methods: a subclass may override them, and they may be set on an instance. It also
reads its options at each call: they may have been changed since construction. The functions here find this out when a
class is made or an attribute is set, so that an ordinary call only reads one flag.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

from torch import Tensor, nn

__all__ = ["CHECKS", "WATCHED", "WEIGHT_METHODS", "check_options", "is_unusual", "overrides", "weight_names"]

# The methods that nn.LSTM.forward calls, directly or through each other, before and after it computes.
CHECKS = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)

# The methods with which nn.LSTM.forward updates self._flat_weights, the list that it then computes with.
WEIGHT_METHODS = ("_init_flat_weights", "_update_flat_weights", "_weights_have_changed")

_FLAGS = ("bias", "batch_first", "bidirectional", "training")
_SIZES = ("input_size", "hidden_size", "num_layers", "proj_size")

# The attributes of an instance that may make it unusual when they are set.
WATCHED = frozenset((*CHECKS, *WEIGHT_METHODS, *_FLAGS, *_SIZES, "dropout", "forward"))


def overrides(cls: type, base: type, names: tuple[str, ...]) -> bool:
    """Whether ``cls`` overrides any of these methods of ``base``."""
    return any(getattr(cls, name) is not getattr(base, name) for name in names)


def weight_names(module: nn.RNNBase) -> list[str]:
    """The names of the weights that the current options ask for, in the operators' order."""
    kinds = ["weight_ih", "weight_hh"]
    if module.bias:
        kinds += ["bias_ih", "bias_hh"]
    if module.proj_size > 0:
        kinds.append("weight_hr")
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"{kind}_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions for kind in kinds]


def is_unusual(module: nn.RNNBase) -> bool:
    """Whether calls of this module cannot take the fast path because of an attribute of the instance itself."""
    own = vars(module)
    if any(name in own for name in (*CHECKS, *WEIGHT_METHODS)):
        return True
    if any(type(own.get(name, False)) is not bool for name in _FLAGS):
        return True
    if any(type(own.get(name, 1)) is not int for name in _SIZES) or type(own.get("dropout", 0.0)) not in (float, int):
        return True
    names = own.get("_flat_weights_names")
    if not names or "_all_weights" not in own or not own["_all_weights"]:
        return False  # the constructor is still running
    if module.proj_size < 0 or names != weight_names(module):
        return True
    recurrent = own["_parameters"].get(names[1])
    return recurrent is not None and recurrent.shape != (4 * module.hidden_size, module.proj_size or module.hidden_size)


def _type(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_options(module: nn.RNNBase) -> None:
    """Refuse options that were changed to values that no call can obey.

    Raises:
        TypeError: for an option of the wrong type, as ``torch.nn.LSTM`` when it is called.
        ValueError: for sizes that no stack can have.
        RuntimeError: for options that the module's weights were not made for.
    """
    for name in _FLAGS:
        value = getattr(module, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be of type bool, got: {_type(value)}")
    for name in ("num_layers", "hidden_size", "proj_size"):
        value = getattr(module, name)
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} should be of type int, got: {_type(value)}")
    dropout: Any = module.dropout
    if not isinstance(dropout, (Number, Tensor)):
        raise TypeError(f"dropout should be a number, got: {_type(dropout)}")
    for name in ("num_layers", "hidden_size"):
        if getattr(module, name) < 1:
            raise ValueError(f"{name} must be greater than zero, got: {getattr(module, name)}")
    if module.proj_size < 0:
        raise ValueError(f"proj_size should be a positive integer or zero to disable projections, got: {module.proj_size}")

    names = weight_names(module)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        options = ", ".join(f"{name}={getattr(module, name)}" for name in ("num_layers", "bias", "bidirectional", "proj_size"))
        raise RuntimeError(f"{options} ask for {missing[0]}, which this module does not have: it was made with other options")
    rows, columns = getattr(module, names[1]).shape
    if rows != 4 * module.hidden_size:
        raise RuntimeError(f"hidden_size={module.hidden_size} asks for a {names[1]} of {4 * module.hidden_size} rows, got: {rows}")
    if columns != (module.proj_size or module.hidden_size):
        size = "proj_size" if module.proj_size else "hidden_size"
        raise RuntimeError(f"{size}={getattr(module, size)} asks for a {names[1]} of as many columns, got: {columns}")
