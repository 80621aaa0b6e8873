"""What a subclass or an instance of :class:`.StackedLSTM` may change that the fast paths of a call would ignore.

``torch.nn.LSTM`` calls its checks as methods: a subclass may override them, and they may be set on an instance. It also
reads its options at each call: they may have been changed since construction. The functions here find this out when a
class is made or an attribute is set, so that an ordinary call only reads one flag.
"""

from __future__ import annotations

from numbers import Number
from typing import Any

from torch import Tensor, nn

from .layout import LINKS, for_each_layer, weights_of_stack
from .options import check_dropouts, check_link, check_widths, count_layers, used_entries

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

_FLAGS = ("bias", "batch_first", "bidirectional", "return_sequences", "training")
_WIDTHS = ("hidden_size", "proj_size")  # each an int, or a tuple with an entry for each layer
_SIZES = ("input_size", "num_layers", *_WIDTHS)

# The attributes of an instance that may make it unusual when they are set.
WATCHED = frozenset((*CHECKS, *WEIGHT_METHODS, *_FLAGS, *_SIZES, "dropout", "forward", "link", "recompute", "bf16_weights"))


def overrides(cls: type, base: type, names: tuple[str, ...]) -> bool:
    """Whether ``cls`` overrides any of these methods of ``base``."""
    return any(getattr(cls, name) is not getattr(base, name) for name in names)


def weight_names(module: nn.RNNBase) -> list[str]:
    """The names of the weights that the current options ask for, in the operators' order."""
    directions = ("", "_reverse") if module.bidirectional else ("",)
    proj_sizes = for_each_layer(module.proj_size, module.num_layers)
    places = weights_of_stack(module.bias, len(directions), proj_sizes)
    return [f"{kind}_l{layer}{directions[direction]}" for layer, direction, kind in places]


def _has_type(value: Any, kinds: tuple[type, ...], entries: Any) -> bool:
    """Whether ``value`` is of one of these types, or a tuple of so many of them. (A subclass may count in a way of its own.)"""
    if type(value) is tuple:
        return len(value) == entries and all(type(entry) in kinds for entry in value)
    return type(value) in kinds


def is_unusual(module: nn.RNNBase) -> bool:
    """Whether calls of this module cannot take the fast path because of an attribute of the instance itself."""
    own = vars(module)
    if any(name in own for name in (*CHECKS, *WEIGHT_METHODS)):
        return True
    if any(type(own.get(name, False)) is not bool for name in _FLAGS):
        return True
    if any(type(own.get(name, 1)) is not int for name in ("input_size", "num_layers")):
        return True
    layers = own.get("num_layers", 1)
    if not all(_has_type(own.get(name, 1), (int,), layers) for name in _WIDTHS):
        return True
    if not _has_type(own.get("dropout", 0.0), (float, int), layers - 1):
        return True
    if own.get("link", "plain") not in LINKS:
        return True
    names = own.get("_flat_weights_names")
    if not names or "_all_weights" not in own or not own["_all_weights"]:
        return False  # the constructor is still running
    if any(size < 0 for size in for_each_layer(module.proj_size, layers)) or names != weight_names(module) or _misfit(module):
        return True
    try:
        check_link(own.get("link", "plain"), module.hidden_size, module.proj_size, layers)
    except ValueError:
        return True
    return False


def _misfit(module: nn.RNNBase, *, computed: bool = False) -> str:
    """Which option the weights do not fit, in words; empty if they fit. (How wide the stack's own input is, each call checks.)

    Args:
        computed: whether to look at weights that are no parameters, too: a parametrization computes them when it is asked.
    """
    layers, link = module.num_layers, getattr(module, "link", "plain")
    directions, beside = 2 if module.bidirectional else 1, module.input_size if link == "skip" else 0

    def shape_of(name: str) -> tuple[int, ...] | None:
        weight = getattr(module, name) if computed else vars(module)["_parameters"].get(name)
        if weight is None:
            return None
        return tuple(weight.shape) if weight.dim() == 2 else (-1, -1)

    below = 0  # columns that a layer's weight_ih should have
    sizes = zip(for_each_layer(module.hidden_size, layers), for_each_layer(module.proj_size, layers), strict=True)
    for layer, (hidden, proj) in enumerate(sizes):
        name = f"weight_hh_l{layer}"
        rows, columns = shape_of(name) or (4 * hidden, proj or hidden)
        if rows != 4 * hidden:
            return f"{_entry(module, 'hidden_size', layer)} asks for a {name} of {4 * hidden} rows, got: {rows}"
        if columns != (proj or hidden):
            option = _entry(module, "proj_size" if proj else "hidden_size", layer)
            return f"{option} asks for a {name} of as many columns, got: {columns}"
        name = f"weight_ih_l{layer}"
        shape = shape_of(name)
        if layer > 0 and shape is not None and shape[1] != below:
            options = [f"link={link!r}", f"bidirectional={module.bidirectional}", *([f"input_size={beside}"] if beside else [])]
            return f"{', '.join(options)} ask for a {name} of {below} columns, got: {shape[1]}"
        below = directions * (proj or hidden) + beside
    return ""


def _entry(module: nn.RNNBase, name: str, layer: int) -> str:
    """A size of a layer as its user wrote it: ``hidden_size=5`` or ``hidden_size[1]=5``."""
    value: Any = getattr(module, name)
    return f"{name}[{layer}]={value[layer]}" if isinstance(value, tuple) else f"{name}={value}"


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
        if not (name in _WIDTHS and isinstance(value, tuple)) and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise TypeError(f"{name} should be of type int, got: {_type(value)}")
    dropout: Any = module.dropout
    if not isinstance(dropout, (Number, Tensor, tuple)):
        raise TypeError(f"dropout should be a number, got: {_type(dropout)}")
    if module.num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got: {module.num_layers}")
    layers = int(module.num_layers)
    hidden_size, proj_size = used_entries(module.hidden_size, layers), used_entries(module.proj_size, layers)
    dropout = used_entries(dropout, layers - 1)
    count_layers(layers, hidden_size, proj_size, dropout)
    check_widths(hidden_size, proj_size, layers)
    check_link(getattr(module, "link", "plain"), hidden_size, proj_size, layers)
    if isinstance(dropout, tuple):
        check_dropouts(dropout)

    names = weight_names(module)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        options = ", ".join(f"{name}={getattr(module, name)}" for name in ("num_layers", "bias", "bidirectional", "proj_size"))
        raise RuntimeError(f"{options} ask for {missing[0]}, which this module does not have: it was made with other options")
    misfit = _misfit(module, computed=True)
    if misfit:
        raise RuntimeError(misfit)
