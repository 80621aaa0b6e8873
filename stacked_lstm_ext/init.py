"""Initial values for LSTMs: :func:`keras_`, those that Keras gives an LSTM, and :func:`forget_bias_`, the forget gate's bias alone.

Both take a :class:`.StackedLSTM` or a ``torch.nn.LSTM``, change it in place and return it. They set every weight that the module
has, also one that options changed after construction leave unused. What each of them writes becomes the module's weight:

* A parametrized weight (``torch.nn.utils.parametrize``) is assigned as by ``lstm.weight_hh_l0 = value``: the ``right_inverse`` of
  the parametrization is given the value, and the weight is what the parametrization makes of it.
* A pruned weight (``torch.nn.utils.prune``) is set before its mask: what is masked stays 0.
* A weight that another hook computes (``torch.nn.utils.weight_norm``, ``torch.nn.utils.spectral_norm``) cannot be set. That is a
  ``RuntimeError`` that names the weight, and nothing has been changed.
"""

from __future__ import annotations

import re
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .module import StackedLSTM

__all__ = ["forget_bias_", "keras_"]

LSTM = TypeVar("LSTM", bound=nn.RNNBase)

_BIASES = ("bias_ih", "bias_hh")
_ALL = ("weight_ih", "weight_hh", *_BIASES, "weight_hr")


def keras_(lstm: LSTM, *, generator: torch.Generator | None = None) -> LSTM:
    r"""Give an LSTM the initial values that Keras gives its LSTM layer by default, in every layer and direction.

    Keras keeps the transposed matrices. Its kernel ``(I, 4H)`` and its recurrent kernel ``(out, 4H)`` have all four gates, and
    each of them is drawn as one matrix.

    * ``weight_ih``: Glorot uniform, U(±√(6 / (I + 4H))), where I is the width of the layer's input (Glorot & Bengio 2010).
    * ``weight_hh``: orthogonal (Saxe et al. 2014): its columns are orthonormal, W_hhᵀ·W_hh is the identity. A single gate's part is not
      orthogonal.
    * ``bias_ih``: 1 for the forget gate (Keras's ``unit_forget_bias``; Jozefowicz et al. 2015), 0 elsewhere.
    * ``bias_hh``: 0. Keras has one bias; here the two add up, so only ``bias_ih`` has the 1.
    * ``weight_hr``: Glorot uniform, U(±√(6 / (H + P))). Keras's LSTM has no projection.

    The values are drawn in the order of the parameters. 16-bit weights are drawn in float32 and rounded, so they are the rounded
    weights of a float32 module under the same seed. Weights on the meta device stay without values: call this function after
    ``to_empty``.

    Args:
        lstm: a :class:`.StackedLSTM` or a ``torch.nn.LSTM``.
        generator: what to draw from; torch's global generator of the device by default.

    Returns:
        ``lstm``.

    Raises:
        TypeError: for any other module.
        RuntimeError: for a weight that cannot be set; nothing has been changed.

    Example::

        >>> lstm = init.keras_(StackedLSTM(64, hidden_size=(256, 128)))
    """
    for name, kind in _weights(lstm, _ALL):
        weight = _stored(lstm, name)
        # torch has no orthogonal_ for 16-bit tensors: no QR decomposition.
        value = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        if kind == "weight_hh":
            nn.init.orthogonal_(value, generator=generator)
        elif kind in ("weight_ih", "weight_hr"):
            nn.init.xavier_uniform_(value, generator=generator)
        elif kind == "bias_ih":
            _forget_gate(value).fill_(1.0)
        _assign(lstm, name, value.to(weight.dtype))
    return lstm


def forget_bias_(lstm: LSTM, value: float = 1.0) -> LSTM:
    """Set the bias of the forget gate in every layer and direction. Nothing else changes.

    A forget gate with a positive bias begins by keeping c, so that gradients reach early steps (Gers et al. 2000, Jozefowicz et
    al. 2015). ``bias_ih`` and ``bias_hh`` add up: ``bias_ih`` gets ``value``, and ``bias_hh`` gets 0.

    Args:
        lstm: a :class:`.StackedLSTM` or a ``torch.nn.LSTM``.
        value: the sum of the two biases, for each hidden unit.

    Returns:
        ``lstm``.

    Raises:
        TypeError: for any other module.
        ValueError: if the module has no biases, or ``value`` is no number that is finite in their dtype.
        RuntimeError: for a bias that cannot be set. In all these cases nothing has been changed.
    """
    biases = _weights(lstm, _BIASES)
    if not biases:
        raise ValueError(f"value is {value!r}, and this {type(lstm).__name__} has no biases")
    dtype = _stored(lstm, biases[0][0]).dtype
    is_number = isinstance(value, Real)
    if not is_number or not abs(value) <= torch.finfo(dtype).max:  # no comparison with NaN is true
        raise ValueError(f"value should be a finite number in {dtype}, got: {value!r}")
    for name, kind in biases:
        bias = _stored(lstm, name).detach().clone()
        _forget_gate(bias).fill_(float(value) if kind == "bias_ih" else 0.0)
        _assign(lstm, name, bias)
    return lstm


def _forget_gate(bias: Tensor) -> Tensor:
    """The forget gate's part, the second of i, f, g, o."""
    return bias.chunk(4)[1]


def _weights(lstm: nn.RNNBase, kinds: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and kind of each weight of these kinds that the module has, in the order of the parameters. All of them can be set.

    Raises:
        TypeError: for a module that is no LSTM.
        RuntimeError: for a weight that cannot be set.
    """
    if not isinstance(lstm, (StackedLSTM, nn.LSTM)):
        raise TypeError(f"lstm should be a StackedLSTM or a torch.nn.LSTM, got: {type(lstm).__name__}")
    found = []
    for name in lstm._flat_weights_names:
        match = re.fullmatch(r"(\w+)_l\d+(_reverse)?", name)
        if match is None or match[1] not in kinds or getattr(lstm, name, None) is None:
            continue
        if parametrize.is_parametrized(lstm, name):
            for parametrization in lstm.parametrizations[name]:  # type: ignore[index]
                if not hasattr(parametrization, "right_inverse"):
                    obstacle = f"its parametrization {type(parametrization).__name__} has no right_inverse"
                    raise RuntimeError(f"cannot set {name}: {obstacle}. Initialise first, parametrize then")
        elif lstm._parameters.get(name) is None and not _is_pruned(lstm, name):
            obstacle = "it is no parameter, but computed, by torch.nn.utils.weight_norm for example"
            raise RuntimeError(f"cannot set {name}: {obstacle}. Initialise first")
        found.append((name, match[1]))
    return found


def _is_pruned(lstm: nn.RNNBase, name: str) -> bool:
    """Whether ``torch.nn.utils.prune`` computes this weight: the product of a parameter and a mask."""
    return lstm._parameters.get(f"{name}_orig") is not None and lstm._buffers.get(f"{name}_mask") is not None


def _stored(lstm: nn.RNNBase, name: str) -> Tensor:
    """The tensor in which :func:`_assign` puts a weight's value. (Of a parametrized weight: its value.)"""
    tensor: Tensor = getattr(lstm, f"{name}_orig" if _is_pruned(lstm, name) else name)
    return tensor


def _assign(lstm: nn.RNNBase, name: str, value: Tensor) -> None:
    if parametrize.is_parametrized(lstm, name):
        setattr(lstm, name, value)
        return
    stored = _stored(lstm, name)
    with torch.no_grad():
        stored.copy_(value)  # an operation that raises the version, which a frozen module looks at
    if _is_pruned(lstm, name):
        # prune computes the weight in a hook, before a call of the module. step() and states() run no hooks.
        setattr(lstm, name, stored * getattr(lstm, f"{name}_mask"))
