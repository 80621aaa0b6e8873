""":class:`StackedLSTM`, the drop-in for ``torch.nn.LSTM``."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from . import ops
from .layout import StateLayout, for_each_layer, weight_kinds
from .options import StackOptions, as_tuple, check_dropouts, check_link, check_widths, count_layers, used_entries
from .plan import Plan, choose_backend, choose_saving, kernel_backend, make_plan, runs_on_cpu, stores_bf16
from .reference import round_to_bf16
from .sequences import as_lengths, as_reset, as_resets, check_lengths, last_rows
from .states import Given, StackStates, State, check_dimensions, checked_pair, joined, map_state, parts, split
from .transplant import both, obstacle_to_replacing, only_adds_a_constructor, original_class, transplant
from .unusual import CHECKS, WATCHED, WEIGHT_METHODS, check_options, is_unusual, overrides, weight_names

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["StackedLSTM", "TorchStackedLSTM"]

# The ways that a call may take. An ordinary call asks for its way once, and goes on if that is _PLAIN.
_PLAIN = 0
_FORMED = 1  # states are tuples, or the output is the last step: arguments and results of the shortest way get another form
_METHODS = 2  # every check is called as a method and every option is read, as nn.LSTM does


class _NotGiven(int):
    """The default of ``num_layers``. It is 1, but it is not the 1 of a caller, with which the other sizes have to agree."""


_ONE_LAYER = _NotGiven(1)


class _ForEachLayer:
    """``lstm.hidden_sizes`` from ``lstm.hidden_size``.

    This is no property: a subclass, or a module that was converted, may have an attribute of this name, which then counts.
    """

    def __init__(self, option: str, doc: str) -> None:
        self.option = option
        self.__doc__ = doc

    def __get__(self, module: StackedLSTM | None, owner: type | None = None) -> Any:
        return self if module is None else for_each_layer(getattr(module, self.option), module.num_layers)


class StackedLSTM(nn.RNNBase):
    r"""A multi-layer LSTM whose layers run as a wavefront: drop-in for :class:`torch.nn.LSTM`.

    Arguments, inputs, outputs, parameters, their initial values for a given seed, the ``state_dict`` and the errors are
    those of ``torch.nn.LSTM``; the equations are in ``csrc/stack/cell.h``. What differs:

    * Layer k works on step t while layer k-1 works on step t+1, so depth costs little time.
    * Dropout masks come from Philox, one draw for each element: the same ``torch.manual_seed`` gives the same bits
      whatever the number of threads (but not the bits of ``torch.nn.LSTM``).
    * A ``PackedSequence`` has its feature size and its initial states checked.
    * It is not an ``nn.LSTM`` by ``isinstance``, since ``torch.compile`` refuses to trace an ``nn.LSTM``.
      :func:`.convert_lstm` swaps the LSTMs inside a model; with ``as_lstm=True`` the new modules are both.

    A subclass may override the same methods as a subclass of ``nn.LSTM`` (``check_input``, ``check_forward_args``,
    ``permute_hidden``, ...), and such a method may be set on an instance. Options may be changed after construction:
    ``num_layers``, ``bias`` and ``bidirectional`` then say which of the weights are used.

    Args:
        input_size: features of the input.
        hidden_size: features of h (unless projected) and of c. A sequence has an entry for each layer.
        num_layers: layers, each working on the output of the one below. A sequence for another argument says it, too; if both
            are given, they have to agree.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether batched input and output are ``(N, T, feature)`` rather than ``(T, N, feature)``.
        dropout: probability of an element of a layer's output being zeroed, in training, for all layers but the last. A
            sequence has an entry for each boundary between two layers, one fewer than there are layers.
        bidirectional: whether every layer also runs backwards in time.
        proj_size: if positive, h is projected to this many features. A sequence has an entry for each layer, 0 for none.
        device: of the parameters.
        dtype: of the parameters. float32, float64, bfloat16 and float16 have kernels.
        recompute: keep h and little else for the backward pass, which then computes the gates again. This takes two
            fifths of the memory on the CPU and a third on a GPU, and costs at most one more product per layer.
        bf16_weights: round the weight matrices to bfloat16 for the products. Parameters, gradients, biases, states and
            all arithmetic stay in the module's dtype. The CPU kernels then read half the bytes of float32 weights;
            a small batch of a wide stack spends its time on reading weights. On a GPU and in float64, the products use
            the same rounded weights, but nothing is gained. The error of a rounding is at most 2^-8 of the weight
            (docs/api.md says what that does to results). Where the processor multiplies bfloat16 itself, the input of
            every layer is rounded, too. A bfloat16 module gains as much without the option.
        link: what a layer reads of the layers below it, and what the output is. u_k is the input of layer k, x that of the stack,
            m_k the dropout mask behind layer k, L the number of layers. A stack of one layer has no links.

            ================  ==============================================  ===========================================
            ``"plain"``       u_(k+1) = m_k·h_k                               output h_(L-1), as ``nn.LSTM``
            ``"residual"``    u_1 = m_0·h_0, then u_(k+1) = m_k·h_k + u_k     output h_(L-1) + u_(L-1); Wu et al. 2016 (GNMT)
            ``"skip"``        u_(k+1) = [m_k·h_k, x], side by side            output [h_0, …, h_(L-1)]; Graves 2013
            ================  ==============================================  ===========================================

            ``h_n`` is each cell's own h in any case. Residual links need layers whose h is equally wide. With skip links,
            ``weight_ih_l{k}`` of the layers above the first is ``(4·H_k, D·out_(k-1) + input_size)``.
        return_sequences: whether the output has all steps. If not, it is the last step alone, ``(N, features)``: each sequence's
            own last step and, for the reverse direction, the one that it ends with (time 0).

    Inputs:
        * **input**: ``(T, N, input_size)``, ``(N, T, input_size)`` if ``batch_first``, ``(T, input_size)`` unbatched,
          or a ``PackedSequence``. T is at least 1; N may be 0.
        * **hx**: ``(h_0, c_0)`` as a tuple or list, shaped ``(D·num_layers, N, proj_size or hidden_size)`` and
          ``(D·num_layers, N, hidden_size)``, without N when unbatched; zeros by default. D is 2 if bidirectional,
          else 1. If ``hidden_size`` or ``proj_size`` was given as a sequence, also one of equal entries, each of the two is
          a tuple or list with a tensor for each layer: ``(D, N, out_k)`` for h, where out_k is the layer's projection size
          or, without a projection, its hidden size, and ``(D, N, H_k)`` for c.
        * **lengths** (keyword): how many steps each sequence of a padded batch has: N integers in [1, T], in any order, as a
          tensor ``(N,)`` of any integer dtype or a sequence. What is in the padding is never read: it may be NaN. Outputs are
          zero there, and so is the gradient of the input; the gradient that comes in there counts for nothing. ``h_n`` and
          ``c_n`` are those of each sequence's own last step, where the reverse direction begins. Nothing is packed. The data is
          copied only if the batch is not sorted by length, the longest first. Dropout masks are those of a packed batch. The
          kernels need lengths on the CPU: a tensor on a GPU costs one synchronisation a call. Not with a ``PackedSequence`` and
          not unbatched.
        * **resets** (keyword): where sequences are reset, as reinforcement learning needs it at the start of an episode: a bool
          tensor ``(T, N)``, ``(N, T)`` if ``batch_first``, ``(T,)`` unbatched, on the device of the input. True at step t puts
          zeros in the place of the states h and c that would cross between the steps t-1 and t, in both directions, and no
          gradient crosses. At t = 0 that are h_0 and c_0 of the forward direction. A reset behind a sequence's end counts for
          nothing. Not with a ``PackedSequence``.

    Outputs:
        ``(output, (h_n, c_n))``: output ``(T, N, D·(proj_size or hidden_size))``, by the sizes of the last layer, in the form
        of the input; ``h_n`` and ``c_n`` shaped as ``h_0`` and ``c_0`` (tuples where those are tuples or lists). With skip links,
        the output has the features of all layers: ``(T, N, D·Σ out_k)``. Without ``return_sequences`` it has no T: ``(N, ...)``,
        ``(...)`` unbatched; for a ``PackedSequence`` it is a tensor as well, in the caller's order of sequences.

    Attributes:
        hidden_sizes: the hidden size of each layer, a tuple in any case.
        proj_sizes: the projection size of each layer, 0 for none; likewise.

    Raises:
        ValueError: for sizes out of range or sequences whose lengths do not agree, an unknown ``link``, residual links between
            layers whose h are not equally wide, an input that is neither 2-D nor 3-D, or one whose dtype is not the
            weights', ``lengths`` that are out of range or too few or too many, ``resets`` of another shape or on another
            device, and either of them where it should be left out.
        TypeError: for constructor arguments of the wrong type (``bidirectional`` is checked at a call, as in
            ``nn.LSTM``), an ``hx`` that is neither a tuple nor a list, states that are tuples where tensors are expected
            or the other way round, ``lengths`` that are no integers, or ``resets`` that are no tensor of dtype bool.
        RuntimeError: for options that were changed to values that the weights were not made for, for sizes that do not
            fit, an empty sequence, tensors on several devices, and for a forced backend (:func:`.backend`) that cannot
            run the call (ValueError if that backend is ``"persistent"``).

    Example::

        >>> lstm = StackedLSTM(10, 20, num_layers=8)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))

        >>> lstm = StackedLSTM(10, (64, 32, 16), dropout=(0.2, 0.1))
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> [tuple(h.shape) for h in h_n]
        [(1, 3, 64), (1, 3, 32), (1, 3, 16)]

        >>> lstm = StackedLSTM(10, 20, num_layers=4, link="residual", return_sequences=False)
        >>> output, _ = lstm(torch.randn(5, 3, 10), lengths=[5, 2, 4])
        >>> output.shape
        torch.Size([3, 20])
    """

    # int, int and float, or tuples of them. Any: who gave numbers may go on to compute with numbers, also before a type checker.
    hidden_size: Any
    proj_size: Any
    dropout: Any
    hidden_sizes = _ForEachLayer("hidden_size", "The hidden size of each layer.")
    proj_sizes = _ForEachLayer("proj_size", "The projection size of each layer, 0 where there is none.")

    recompute: bool
    bf16_weights: bool
    link: str = "plain"
    return_sequences: bool = True
    _frozen = False
    _kept_options: StackOptions | None = None
    # _METHODS if the class overrides one of the methods that nn.LSTM calls, or the instance has an unusual attribute
    _call_way = _PLAIN
    _step_way = _PLAIN  # _METHODS also if forward is overridden: then step calls forward
    _overrides_weights = False  # the class updates _flat_weights itself, and calls compute with that list

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._note_overrides()

    @classmethod
    def _note_overrides(cls) -> None:
        """Note whether the class overrides anything that the fast paths of a call would ignore."""
        cls._overrides_weights = overrides(cls, StackedLSTM, WEIGHT_METHODS) or hasattr(cls, "_flat_weights")
        unusual = cls._overrides_weights or overrides(cls, StackedLSTM, CHECKS)
        cls._call_way = _METHODS if unusual else _PLAIN
        cls._step_way = _METHODS if unusual or overrides(cls, StackedLSTM, ("forward",)) else _PLAIN

    @property
    def _unusual(self) -> bool:
        """Whether a call has to call every check as a method and to read every option."""
        return self._call_way == _METHODS

    @property
    def _unusual_step(self) -> bool:
        """Whether step has to call forward."""
        return self._step_way == _METHODS

    @property
    def _by_layer(self) -> bool:
        """Whether states are tuples with a tensor for each layer."""
        return isinstance(self.hidden_size, tuple) or isinstance(self.proj_size, tuple)

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = _ONE_LAYER,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float | Sequence[float] = 0.0,
        bidirectional: bool = False,
        proj_size: int | Sequence[int] = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        bf16_weights: bool = False,
        link: str = "plain",
        return_sequences: bool = True,
    ) -> None:
        flags = {"recompute": recompute, "bf16_weights": bf16_weights, "return_sequences": return_sequences}
        for name, option in flags.items():
            if not isinstance(option, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(option).__name__}")
        hidden, proj, rates = as_tuple(hidden_size), as_tuple(proj_size), as_tuple(dropout)
        by_layer = isinstance(hidden, tuple) or isinstance(proj, tuple)
        given = None if isinstance(num_layers, _NotGiven) else num_layers
        if by_layer or isinstance(rates, tuple):
            num_layers = count_layers(given, hidden, proj, rates)
            if isinstance(rates, tuple):
                check_dropouts(rates)
                rates = tuple(map(float, rates))
        elif given is None:
            num_layers = 1  # a plain int
        rate = 0.0 if isinstance(rates, tuple) else rates
        if by_layer or link != "plain":
            self._init_by_layer(input_size, hidden, num_layers, bias, batch_first, rate, bidirectional, proj, link, device, dtype)
        else:
            nn.RNNBase.__init__(  # not super(): with as_lstm, that is nn.LSTM.__init__
                self, "LSTM", input_size, hidden, num_layers, bias, batch_first, rate, bidirectional, proj, device, dtype
            )
        if isinstance(rates, tuple):
            self.dropout = rates
        self.link = link
        self.return_sequences = return_sequences
        self.recompute = recompute
        self.bf16_weights = bf16_weights

    def _init_by_layer(
        self,
        input_size: int,
        hidden_size: int | tuple[int, ...],
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int | tuple[int, ...],
        link: str,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        """What the constructor of ``nn.RNNBase`` does, with sizes for each layer: the same checks, attributes and parameters."""
        # torch's own checks of the other arguments, its warning of dropout in a single layer, and its attributes.
        narrow = nn.RNNBase("LSTM", input_size, 1, num_layers, bias, batch_first, dropout, bidirectional, device="meta")
        check_widths(hidden_size, proj_size, num_layers)
        check_link(link, hidden_size, proj_size, num_layers)
        nn.Module.__init__(self)
        for name in nn.RNNBase.__constants__:
            setattr(self, name, getattr(narrow, name))
        self.hidden_size, self.proj_size = _each(operator.index, hidden_size), _each(operator.index, proj_size)
        self._flat_weight_refs = []
        self._flat_weights_names, self._all_weights = [], []
        below = input_size
        sizes = zip(for_each_layer(self.hidden_size, num_layers), for_each_layer(self.proj_size, num_layers), strict=True)
        for layer, (hidden, proj) in enumerate(sizes):
            out = proj or hidden
            shapes = {"weight_ih": (4 * hidden, below), "weight_hh": (4 * hidden, out), "weight_hr": (proj, hidden)}
            for suffix in ("", "_reverse") if bidirectional else ("",):
                kinds = weight_kinds(bias, proj > 0)
                names = [f"{kind}_l{layer}{suffix}" for kind in kinds]
                for name, kind in zip(names, kinds, strict=True):
                    setattr(self, name, nn.Parameter(torch.empty(shapes.get(kind, (4 * hidden,)), device=device, dtype=dtype)))
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
            below = (2 if bidirectional else 1) * out + (input_size if link == "skip" else 0)
        self._init_flat_weights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: those of layer k from U(-1/√H_k, 1/√H_k)."""
        if not isinstance(self.hidden_size, tuple):
            super().reset_parameters()
            return
        sizes = dict(enumerate(self.hidden_size))
        for name, parameter in self.named_parameters():
            named = re.search(r"_l(\d+)", name)  # a parametrization puts its own words before and behind it
            # A parameter that a subclass has added is treated as one of the first layer.
            bound = 1.0 / math.sqrt(sizes.get(int(named[1]), sizes[0]) if named else sizes[0])
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, *, recompute: bool = False, bf16_weights: bool = False) -> StackedLSTM:
        """A new module that shares the very same ``Parameter`` objects with ``lstm``.

        Parametrizations, hooks (also those of weight norm and pruning) and the training flag are taken over; ``lstm``
        itself does not change. If this method is called on :class:`StackedLSTM` itself, not on a subclass, it keeps
        what a subclass of ``nn.LSTM`` defines, as :func:`.convert_lstm` does.

        Raises:
            TypeError: if ``lstm`` is not an ``nn.LSTM``, or if its class cannot be carried over, for example because it
                overrides ``forward``.
        """
        if not isinstance(lstm, nn.LSTM):
            raise TypeError(f"lstm should be a torch.nn.LSTM, got: {type(lstm).__name__}")
        obstacle = obstacle_to_replacing(lstm, nn.LSTM, carry=TorchStackedLSTM if cls is StackedLSTM else None)
        if obstacle:
            raise TypeError(f"cannot make a {cls.__name__} of this LSTM: {obstacle}")
        target = stacked_class(lstm) if cls is StackedLSTM else cls
        return transplant(lstm, target, options={"recompute": recompute, "bf16_weights": bf16_weights}, take_hooks=False)

    def to_torch(self) -> nn.LSTM:
        """A new ``torch.nn.LSTM`` that shares the very same ``Parameter`` objects; the inverse of :meth:`from_torch`.

        Raises:
            TypeError: if the module is one that an ``nn.LSTM`` cannot be: layers with sizes or rates that differ, links between
                layers that are not plain, or no ``return_sequences``.
        """
        obstacle = obstacle_to_one_size(self)
        if obstacle:
            raise TypeError(f"cannot make a torch.nn.LSTM of this {type(self).__name__}: {obstacle}")
        return transplant(self, torch_class(self), options=in_one_size(self), take_hooks=False)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_tuple(value) if name in _MAY_BE_FORMED else value)
        if name in WATCHED:
            self._look_again()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in WATCHED:
            self._look_again()

    def _look_again(self) -> None:
        """Note whether the instance has any attribute that the fast paths of a call would ignore."""
        own = self.__dict__
        own.pop("_kept_options", None)
        if type(self).__module__ == __name__:
            # torch.fx treats a module as a leaf if `module.__module__.startswith("torch.nn")`. nn.LSTM passes this
            # test, its subclasses do not; this attribute of the instance makes it pass. pickle and repr read
            # __module__ of the class, which stays as it is. The value is not "torch.nn.modules": torch.compile
            # distinguishes modules of that name from the user's, and can be set to put no guards on their attributes.
            own["__module__"] = "torch.nn"
        unusual = is_unusual(self)
        formed = self.return_sequences is not True or any(isinstance(own.get(name), tuple) for name in ("hidden_size", "proj_size"))
        for flag, methods in (("_call_way", unusual), ("_step_way", unusual or "forward" in own)):
            own.pop(flag, None)  # then the flag of the class counts
            way = _METHODS if methods else _FORMED if formed else _PLAIN
            if way > getattr(self, flag):
                own[flag] = way
        if not self._unusual and "recompute" in own and "bf16_weights" in own:  # the constructor sets them last
            self._stack_options()

    def _check_options(self) -> None:
        """Refuse options that no call can obey. If the instance is no longer unusual, take the fast paths again."""
        if "_call_way" in self.__dict__ and not torch.compiler.is_compiling():
            self._look_again()
        check_options(self)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("__module__", "_kept_options", "_call_way", "_step_way"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The pickle may be of an nn.LSTM, or of a version of this module that did not have these settings yet.
        self.__dict__.setdefault("recompute", False)
        self.__dict__.setdefault("bf16_weights", False)
        self.__dict__.setdefault("link", "plain")
        self.__dict__.setdefault("return_sequences", True)
        self.__dict__.pop("_frozen", None)  # freeze() made its promise for the weights of the module that was pickled
        self._look_again()

    def flatten_parameters(self) -> None:
        """Do nothing: cuDNN needs all weights in one buffer, the kernels of this package do not."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse, with the reason. ``torch.jit.script`` calls this method; without it, it would fail and not say why."""
        raise RuntimeError("torch.jit.script cannot compile a StackedLSTM: script revert_lstm(copy.deepcopy(model)), or use torch.export")

    def drop_packed_weights(self) -> None:
        """Free the packed weights that CPU calls without gradients have kept; later calls pack them again.

        Results do not depend on this: every call makes sure that the packed weights are those of the module (after
        :meth:`freeze`, with the limits stated there).
        """
        ops.drop_packed(self._current_weights()[0])

    def freeze(self) -> Self:
        """Promise that the weights do not change until :meth:`unfreeze`, so that calls need not compare them.

        Without this promise, every CPU call without gradients first compares all bytes of the weights with those that
        were packed. So it notices every write, also a write through ``.data``, NumPy or another process. The comparison
        reads the weights once: little beside a sequence, but about as much as a :meth:`step` itself.

        A change that torch's version counters show (an in-place operation, ``load_state_dict``, ``.to()``, a parameter
        put in the place of another) still gives the right results. After any other write (through ``.data``, by a fused
        optimiser), results are those of the old weights until :meth:`unfreeze` or another :meth:`freeze`.

        The promise does not change ``requires_grad``. Calls that record gradients, compiled calls and calls on other
        devices make no use of it. Copies and pickles of the module are not frozen, nor is a module converted from it.

        Returns:
            the module.
        """
        self.drop_packed_weights()  # they may be out of date: perhaps no call has compared the weights since their last change
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`: calls compare the weights again.

        Returns:
            the module.
        """
        self.__dict__.pop("_frozen", None)
        return self

    def extra_repr(self) -> str:
        options = "".join(f", {name}=True" for name in ("recompute", "bf16_weights") if getattr(self, name))
        if self.link != "plain":
            options += f", link={self.link!r}"
        if not self.return_sequences:
            options += ", return_sequences=False"
        return super().extra_repr() + options

    def get_expected_hidden_size(self, input: Tensor, batch_sizes: Tensor | None) -> Any:
        """The shape that ``h_0`` must have: ``(D·num_layers, N, proj_size or hidden_size)``; of tuples: a list of shapes."""
        return self._expected_size(input, batch_sizes, self._options_of_call().layouts[0])

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> Any:
        """The shape that ``c_0`` must have: ``(D·num_layers, N, hidden_size)``; of tuples: a list of shapes."""
        return self._expected_size(input, batch_sizes, self._options_of_call().layouts[1])

    def _expected_size(self, input: Tensor, batch_sizes: Tensor | None, layout: StateLayout) -> Any:
        batch = input.size(0 if self.batch_first else 1) if batch_sizes is None else _int_of(batch_sizes[0])
        return layout.part_shapes(batch) if self._by_layer else layout.shape(batch)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        # nn.RNNBase reads the cached list of weights, which is out of date while functional_call, a parametrization or
        # a weight norm swaps them. It also asks for autocast on any device; only that of this input's device counts.
        dtype = getattr(self, self._flat_weights_names[0]).dtype
        if input.dtype != dtype and _autocast_dtype(input.device.type) is None:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        expected_dim = 2 if batch_sizes is not None else 3
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}")

    def check_hidden_size(
        self, hx: Tensor, expected_hidden_size: tuple[int, int, int], msg: str = "Expected hidden size {}, got {}"
    ) -> None:
        if torch.compiler.is_compiling() and hx.dim() == 3:
            from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true  # a large import that only a compiler needs

            # The number of sequences of a packed batch is part of its data, which no guard can read. So the compiled
            # program checks it when it runs.
            layers, batch, width = expected_hidden_size
            fits = (hx.size(0), hx.size(2)) == (layers, width)
            if fits and not guard_or_false(hx.size(1) == batch) and guard_or_true(hx.size(1) == batch):
                same = torch.scalar_tensor(batch, dtype=torch.int64) == hx.size(1)
                torch._assert_async(same, "Expected hidden states for as many sequences as the packed batch has")
                return
        super().check_hidden_size(hx, expected_hidden_size, msg)

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Any, Any], batch_sizes: Tensor | None
    ) -> None:
        self.check_input(input, batch_sizes)
        for index, expected in enumerate((self.get_expected_hidden_size, self.get_expected_cell_size)):
            state = hidden[index]
            if isinstance(state, Tensor):
                self.check_hidden_size(state, expected(input, batch_sizes), f"Expected hidden[{index}] size {{}}, got {{}}")
                continue
            for layer, (part, shape) in enumerate(zip(state, expected(input, batch_sizes), strict=True)):
                self.check_hidden_size(part, shape, f"Expected hidden[{index}][{layer}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Any, Any], permutation: Tensor | None
    ) -> tuple[Any, Any]:
        if permutation is None:
            return hx
        h, c = hx
        return map_state(lambda part: part.index_select(1, permutation), h), map_state(lambda part: part.index_select(1, permutation), c)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Sequence[Any] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Any, Any]]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Sequence[Any] | None = None) -> tuple[PackedSequence, tuple[Any, Any]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Any] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Any, Any]]:
        if not self._call_way and not isinstance(input, PackedSequence) and not torch.compiler.is_compiling():
            result = self._fast_call(input, hx, lengths, resets)
            if result is not None:
                return result
        return self._full_call(input, hx, lengths, resets)

    def _full_call(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Any] | None,
        lengths: Tensor | Sequence[int] | None,
        resets: Tensor | None,
    ) -> tuple[Any, tuple[State, State]]:
        if self._call_way == _FORMED and not isinstance(input, PackedSequence) and not torch.compiler.is_compiling():
            result = self._fast_call_in_form(input, hx, lengths, resets)
            if result is not None:
                return result
        given = self._given(input, hx, lengths, resets)
        output, h_n, c_n = self._run(given)
        return self._output_in_form(output, h_n, given), self._states_in_form(h_n, c_n, given)

    def states(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Any] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> StackStates:
        """A call of the module that also returns h and c of every layer at every step.

        All results are differentiable, as often as those of a call. There is no second pass: c is the kernel's own, and under
        the same ``torch.manual_seed`` ``states(input).output`` has the bits of ``self(input)[0]``, with dropout, too. The
        method works where a call works: in ``torch.compile`` and ``torch.export``, under autocast and ``torch.func``. If no
        gradient is recorded, nothing is kept beside the results. Forward hooks do not run, since they belong to calls of the
        module, and neither does a ``forward`` that a subclass overrides.

        Args:
            input: as for a call.
            hx: as for a call.
            lengths: as for a call; ``hidden`` and ``cell`` are zero behind a sequence's end, too.
            resets: as for a call. ``hidden`` and ``cell`` are what each step has computed: only what the next step reads is zero.

        Returns:
            :class:`StackStates`: ``(output, hidden, cell, h_n, c_n)``. ``hidden`` and ``cell`` are tuples with one sequence for
            each layer, h before dropout and without a residual, and c, in the form of the input: ``(T, N, D·out_k)`` and
            ``(T, N, D·H_k)``, also without ``return_sequences``;
            ``(N, T, ...)`` if ``batch_first``, without N when unbatched, a ``PackedSequence`` for a ``PackedSequence``. They
            have the dtype of the output.

        Raises:
            as a call.
        """
        given = self._given(input, hx, lengths, resets)
        output, h_n, c_n, hidden, cell = self._run(given, states=True)
        hidden, cell = (tuple(self._in_form(sequence, given) for sequence in layers) for layers in (hidden, cell))
        return StackStates(self._output_in_form(output, h_n, given), hidden, cell, *self._states_in_form(h_n, c_n, given))

    def _given(
        self,
        input: Tensor | PackedSequence,
        hx: Sequence[Any] | None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> Given:
        """Check a call's arguments as nn.LSTM does, but for what :meth:`_run` checks."""
        unusual = self._unusual
        if unusual:
            self._check_options()
        layers = self.num_layers if self._by_layer else 0
        if isinstance(input, PackedSequence):
            for name, value in (("lengths", lengths), ("resets", resets)):
                if value is not None:
                    raise ValueError(f"{name} should be left out where the input is a PackedSequence")
            data, batch_sizes, sorted_indices, unsorted_indices = input
            # torch makes no checks here, and computes on with a wrong feature size.
            if hx is None:
                self.check_input(data, batch_sizes)
                batch = _int_of(batch_sizes[0])
                hidden = self._zero_states(data, batch)
            else:
                hidden = checked_pair(hx, layers)
                self.check_forward_args(data, hidden, batch_sizes)
                batch = parts(hidden[0])[0].size(1)
                hidden = checked_pair(self.permute_hidden(hidden, sorted_indices), layers)
            return Given(data, batch_sizes, hidden, batch, unusual, permutations=(sorted_indices, unsorted_indices))

        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            if lengths is not None:
                raise ValueError("lengths should be left out where the input has no batch: its length is that of the sequence")
            input = input.unsqueeze(batch_dim)
        batch = input.size(batch_dim)
        if lengths is not None:
            lengths = as_lengths(lengths, batch, input.device)
        if resets is not None:
            resets = as_resets(resets, input, batch_first=self.batch_first, is_batched=is_batched)
        if hx is None:
            if not unusual:
                self.check_input(input, None)
            hidden = self._zero_states(input, batch)
            if unusual:
                self.check_forward_args(input, hidden, None)
        else:
            hidden = checked_pair(hx, layers)
            check_dimensions(hidden, 3 if is_batched else 2)
            if not is_batched:
                hidden = map_state(lambda part: part.unsqueeze(1), hidden[0]), map_state(lambda part: part.unsqueeze(1), hidden[1])
            self.check_forward_args(input, hidden, None)
            if unusual:
                hidden = checked_pair(self.permute_hidden(hidden, None), layers)
        time_major = input.transpose(0, 1) if self.batch_first else input
        return Given(time_major, None, hidden, batch, unusual, is_batched, lengths, resets)

    def _in_form(self, sequence: Tensor, given: Given) -> Any:
        """Rows of all steps, as the kernels have them, in the form of the input."""
        if given.batch_sizes is not None:
            return PackedSequence(sequence, given.batch_sizes, *given.permutations)
        if self.batch_first:
            sequence = sequence.transpose(0, 1)
        return sequence if given.is_batched else sequence.squeeze(0 if self.batch_first else 1)

    def _output_in_form(self, output: Tensor, h_n: Tensor, given: Given) -> Any:
        """The output of a call: all steps or, without ``return_sequences``, the last."""
        if self.return_sequences:
            return self._in_form(output, given)
        last = self._last_step(output, h_n, given)
        unsorted_indices = given.permutations[1]
        if unsorted_indices is not None:
            last = last.index_select(0, unsorted_indices)
        return last if given.is_batched else last.squeeze(0)

    def _last_step(self, output: Tensor, h_n: Tensor, given: Given) -> Tensor:
        """The step that each direction ends with, ``(N, features)``. Mostly h_n has it already: then the output is not read at all."""
        options = self._options_of_call()
        if options.link == "residual" and options.num_layers > 1:
            last = last_rows(output, given.batch_sizes, given.lengths, given.batch)
            if not options.bidirectional:
                return last.clone() if given.lengths is None and given.batch_sizes is None else last
            first = output[: given.batch] if given.batch_sizes is not None else output[0]
            forward, reverse = last.chunk(2, dim=-1)[0], first.chunk(2, dim=-1)[1]
            return torch.cat([forward, reverse], dim=-1)
        if options.link != "skip" and h_n.dim() == 3 and not options.bidirectional:
            return h_n[-1].clone()  # a result shares no memory with another
        layers = options.layouts[0].split(h_n, given.batch)
        used = layers if options.link == "skip" else layers[-1:]
        return torch.cat([direction for layer in used for direction in layer.unbind(0)], dim=-1)

    def _states_in_form(self, h_n: Tensor, c_n: Tensor, given: Given) -> tuple[State, State]:
        """The last states, as the kernels have them, in the form in which the module takes states."""
        last: tuple[State, State] = h_n, c_n
        if self._by_layer:
            h_layout, c_layout = self._options_of_call().layouts
            last = h_layout.split(h_n, given.batch), c_layout.split(c_n, given.batch)
        if given.batch_sizes is not None:
            return self.permute_hidden(last, given.permutations[1])
        if not given.is_batched:
            last = map_state(lambda part: part.squeeze(1), last[0]), map_state(lambda part: part.squeeze(1), last[1])
        return self.permute_hidden(last, None) if given.unusual else last

    def _fast_call(
        self,
        input: Tensor,
        hx: Sequence[Any] | None,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """The call by ``csrc/torch/eager.h``; ``None`` where that declines. It declines wrong calls, too: forward reports the error."""
        if not isinstance(input, Tensor) or input.dim() != 3 or self._dropout_in_effect() or not runs_on_cpu():
            return None
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            return None
        h_0, c_0 = hx or (None, None)
        weights = self._current_weights()
        if _transform((input, *(hx or ()), *weights)) or _autocast_dtype(input.device.type) is not None:
            return None
        options = self._kept_options or self._stack_options()
        time_major = input.transpose(0, 1) if self.batch_first else input
        if lengths is not None and not isinstance(lengths, Tensor):
            lengths = as_lengths(lengths, time_major.size(1), input.device)
        if resets is not None and self.batch_first:
            if not isinstance(resets, Tensor) or resets.dim() != 2:
                return None
            resets = resets.transpose(0, 1)
        result = ops.call(time_major, None, h_0, c_0, weights, None, options.native, 0.0, "cpu", self._frozen, lengths, resets)
        if result is None:
            return None
        ops.drop_packed_with(self, weights[0])
        output, h_n, c_n = result
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _fast_call_in_form(
        self, input: Tensor, hx: Sequence[Any] | None, lengths: Tensor | Sequence[int] | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[State, State]] | None:
        """:meth:`_fast_call` of a module whose states are tuples, or whose output is the last step."""
        if not isinstance(input, Tensor) or input.dim() != 3:
            return None
        options = self._kept_options or self._stack_options()
        batch = input.size(0 if self.batch_first else 1)
        hidden = hx if hx is None or not self._by_layer else joined(hx, options, input, batch)
        if hx is not None and hidden is None:
            return None
        if lengths is not None:
            lengths = as_lengths(lengths, batch, input.device)
        result = self._fast_call(input, hidden, lengths, resets)
        if result is None:
            return None
        output, (h_n, c_n) = result
        if not self.return_sequences:
            time_major = output.transpose(0, 1) if self.batch_first else output
            output = self._last_step(time_major, h_n, Given(time_major, None, (h_n, c_n), batch, False, lengths=lengths))
        return output, split(h_n, c_n, options, hx, batch) if self._by_layer else (h_n, c_n)

    def step(
        self, input: Tensor, hx: Sequence[Any] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, Any]]:
        """Run one time step and return the state for the next: for streaming, where a call of the module is too slow.

        ``output, hx = lstm.step(x[t], hx)`` over all t gives what ``lstm(x, hx)`` gives, up to rounding. It is the same
        function, so it has gradients and works in ``torch.compile``, on a GPU and with every option but
        ``bidirectional``. Forward hooks do not run, since they belong to calls of the module.

        When no gradient is recorded (``torch.no_grad``, ``torch.inference_mode``, or nothing requires one), CPU tensors
        take a fast path. It reads the packed weights that the first two steps leave behind, divides the units of a wide
        stack among torch's threads, and allocates nothing but its results. It also reads the weights themselves to see
        whether they have changed, unless :meth:`freeze` has promised that they do not. The fast path needs contiguous
        states, plain links and no dropout in effect; any other step runs as an ordinary call of one step.

        Args:
            input: ``(N, input_size)``, or ``(input_size,)`` unbatched; ``batch_first`` makes no difference.
            hx: ``(h, c)`` as for a call; zeros by default.
            reset: bool ``(N,)``, without a dimension when unbatched: true puts zeros in the place of a sequence's ``hx``, as
                ``resets`` of a call does at its first step.

        Returns:
            ``(output, (h, c))``: output ``(N, proj_size or hidden_size)`` by the sizes of the last layer (with skip links, the h
            of all layers), without N when unbatched, and the state for the next step, in the form of ``hx``. They share no
            memory.

        Raises:
            RuntimeError: for a bidirectional stack, whose second direction begins with the last step; and as a call.
            ValueError: for an input that is neither 1-D nor 2-D, a ``reset`` of another shape or on another device, and as a
                call.
            TypeError: for a ``reset`` that is no tensor of dtype bool, and as a call.
        """
        if hx is not None and not self._step_way and not torch.compiler.is_compiling():
            result = self._fast_step(input, hx, reset)
            if result is not None:
                output, h, c = result
                return output, (h, c)
        return self._full_step(input, hx, reset)

    def _full_step(self, input: Tensor, hx: Sequence[Any] | None, reset: Tensor | None) -> tuple[Tensor, tuple[State, State]]:
        if hx is not None and self._step_way == _FORMED and not torch.compiler.is_compiling() and isinstance(input, Tensor):
            options = self._kept_options or self._stack_options()
            batch = input.shape[:-1]
            hidden = joined(hx, options, input, *batch) if self._by_layer else hx
            result = None if hidden is None else self._fast_step(input, hidden, reset)
            if result is not None:
                output, h, c = result
                return output, split(h, c, options, hx, *batch) if self._by_layer else (h, c)
        if self.bidirectional:
            raise RuntimeError("step needs a stack of one direction: a bidirectional one begins with the last step as well")
        if input.dim() not in (1, 2):
            raise ValueError(f"step: Expected input to be 1D or 2D, got {input.dim()}D instead")
        time = 1 if self.batch_first and input.dim() == 2 else 0
        sequences = {} if reset is None else {"resets": as_reset(reset, input).unsqueeze(time)}
        output, state = self.forward(input.unsqueeze(time), hx, **sequences)
        return output.squeeze(time) if self.return_sequences else output, state

    def _fast_step(self, input: Tensor, hx: Sequence[Any], reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """One step by ``csrc/torch/step.h``; ``None`` where that declines. This is the common case, so each look-up costs."""
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return None
        if self.bidirectional or (self.training and self._dropout_in_effect()) or not runs_on_cpu():
            return None
        h, c = hx
        weights = self._current_weights()
        if _transform((input, h, c, *weights)):
            return None
        options = self._kept_options or self._stack_options()
        return ops.step(input, h, c, weights, options.native, self._frozen, reset)

    def _zero_states(self, input: Tensor, batch: int) -> tuple[State, State]:
        """The states of a call that was given none: as the kernels take them, or for overridden checks as the caller would give them."""

        def zeros(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=input.dtype, device=input.device)

        h_layout, c_layout = self._options_of_call().layouts
        if self._by_layer and self._unusual:
            return tuple(map(zeros, h_layout.part_shapes(batch))), tuple(map(zeros, c_layout.part_shapes(batch)))
        return zeros(h_layout.shape(batch)), zeros(c_layout.shape(batch))

    def _run(self, given: Given, *, states: bool = False) -> tuple[Any, ...]:
        """Check what the shapes do not show, then run the operator or the reference on time-major or packed input.

        Returns:
            ``(output, h_n, c_n)``, with ``states`` ``(output, h_n, c_n, hidden, cell)``; all as the kernels have them.
        """
        input, batch_sizes, (h_0, c_0) = given.input, given.batch_sizes, given.hidden
        weights = self._weights_in_use()
        self._check_devices(input, (*parts(h_0), *parts(c_0)), weights)
        if input.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        autocast_dtype = _autocast_dtype(input.device.type)
        if autocast_dtype is not None:
            input, *weights = (_cast(tensor, autocast_dtype) for tensor in (input, *weights))
            h_0, c_0 = (map_state(lambda part: _cast(part, autocast_dtype), state) for state in (h_0, c_0))
        self._check_dtypes(input, h_0, c_0, weights)

        dropout = self._dropout_in_effect()
        for index, rate in enumerate(dropout if isinstance(dropout, tuple) else (dropout,)):
            if not 0 <= rate <= 1:
                where = f"dropout[{index}]" if isinstance(dropout, tuple) else "dropout"
                raise RuntimeError(f"{where} probability has to be between 0 and 1, but got {rate}")
        seed = None
        if dropout != 0:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=input.device)

        options = self._options_of_call()
        h_layout, c_layout = options.layouts
        h_0 = h_0 if isinstance(h_0, Tensor) else h_layout.join(h_0)
        c_0 = c_0 if isinstance(c_0, Tensor) else c_layout.join(c_0)
        tensors = (input, h_0, c_0, *weights)
        lengths, resets = given.lengths, given.resets
        parts_of_call = {"lengths": lengths is not None, "resets": resets is not None}
        name, reason = choose_backend(input.device, input.dtype, _transform(tensors), options, **parts_of_call)
        bf16_kernels = self.bf16_weights and stores_bf16(name, input.dtype)
        if self.bf16_weights and not bf16_kernels:
            weights = round_to_bf16(weights)
        if name == "reference":
            if lengths is not None and not torch.compiler.is_compiling():
                check_lengths(lengths, input.size(0))
            stack = (options.bias, options.num_layers, options.bidirectional, options.proj_size, dropout, options.link)
            inputs = (input, batch_sizes, h_0, c_0, weights, seed)
            return ops.run_reference(*inputs, *stack, lengths=lengths, resets=resets, states=states, reason=reason)
        saving = choose_saving(_needs_grad(tensors), self.recompute)
        if saving == "none" and not torch.compiler.is_compiling():
            ops.drop_packed_with(self, weights[0])
        return ops.run_kernel(
            input,
            batch_sizes,
            h_0,
            c_0,
            weights,
            seed,
            options,
            dropout=dropout,
            saving=saving,
            backend=kernel_backend(name),
            bf16_weights=bf16_kernels,
            frozen=self._frozen,
            states=states,
            lengths=lengths,
            resets=resets,
        )

    def _options_of_call(self) -> StackOptions:
        """The options, kept ones if there are. (Compiled code must not depend on what eager calls have kept: it would be
        compiled again after the first of them.)"""
        return (None if torch.compiler.is_compiling() else self._kept_options) or self._stack_options()

    def _stack_options(self) -> StackOptions:
        """The options by the attributes of this moment. They are kept until an attribute is set, unless one is unusual."""
        layers = int(self.num_layers)
        options = StackOptions(
            input_size=int(self.input_size),
            hidden_size=_each(int, used_entries(self.hidden_size, layers)),
            num_layers=layers,
            bias=self.bias,
            bidirectional=self.bidirectional,
            proj_size=_each(int, used_entries(self.proj_size, layers)),
            dropout=_each(float, used_entries(self.dropout, layers - 1)),
            recompute=self.recompute,
            bf16_weights=self.bf16_weights,
            link=self.link,
        )
        if not self._unusual and not torch.compiler.is_compiling():
            self.__dict__["_kept_options"] = options
        return options

    def _dropout_in_effect(self) -> float | tuple[float, ...]:
        """The rate between layers, or each boundary's if they are not all 0."""
        if not (self.training and self.num_layers > 1):
            return 0.0
        dropout = self.dropout
        if not dropout:
            return 0.0
        if not isinstance(dropout, tuple):
            return float(dropout)
        rates: tuple[float, ...] = _each(float, dropout[: self.num_layers - 1])
        return rates if any(rates) else 0.0

    def _current_weights(self) -> list[Tensor]:
        """The current weights, also while functional_call, a parametrization, weight norm or pruning swaps them."""
        parameters = self._parameters
        weights = []
        for name in self._flat_weights_names:
            weight = parameters.get(name)
            weights.append(getattr(self, name) if weight is None else weight)
        return weights

    def _weights_in_use(self) -> list[Tensor]:
        """The current weights that the options ask for; from ``_flat_weights`` if the class overrides its update and the names fit."""
        if not self._unusual:
            return self._current_weights()
        names = weight_names(self)
        if self._overrides_weights:
            self._update_flat_weights()
            if self._flat_weights_names == names:
                flat: list[Any] = self._flat_weights
                return list(flat)
        return [getattr(self, name) for name in names]

    def _check_devices(self, input: Tensor, hidden: tuple[Tensor, ...], weights: list[Tensor]) -> None:
        device = input.device
        for weight in weights:
            if weight.device != device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, "
                    f"found input tensor at {device} and parameter tensor at {weight.device}"
                )
        for state in hidden:
            if state.device != device:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device, "
                    f"found input tensor at {device} and hidden tensor at {state.device}"
                )

    def _check_dtypes(self, input: Tensor, h_0: State, c_0: State, weights: list[Tensor]) -> None:
        dtype = input.dtype
        for index, weight in enumerate(weights):
            if weight.dtype != dtype:
                name = weight_names(self)[index]
                raise RuntimeError(f"Expected {name} to have the input's dtype {dtype}, got {weight.dtype}")
        for index, state in enumerate((h_0, c_0)):
            for layer, part in enumerate(parts(state)):
                if part.dtype != dtype:
                    where = f"hidden[{index}]" if isinstance(state, Tensor) else f"hidden[{index}][{layer}]"
                    raise RuntimeError(f"Expected {where} to have the input's dtype {dtype}, got {part.dtype}")

    def plan(
        self,
        batch_size: int,
        seq_len: int,
        *,
        training: bool | None = None,
        dtype: torch.dtype | None = None,
        threads: int | None = None,
    ) -> Plan:
        """What a call with such an input would run now, and why; nothing is run.

        A call obeys the same choice. As in a call, the current state counts: the forced :func:`.backend`, autocast, the
        thread count and the gradient mode. Sizes are those of a padded batch; the kernels may divide a
        ``PackedSequence`` differently.

        Args:
            batch_size: N, at least 0.
            seq_len: T, at least 1.
            training: whether a backward pass is to follow; by default, whether gradients are on and a parameter
                requires one (in a call, an input that requires a gradient counts as well).
            dtype: of the computation; by default that of the parameters, or autocast's.
            threads: how many threads there are; by default ``torch.get_num_threads()``.

        Raises:
            ValueError: for sizes that no input can have.
            RuntimeError: if the forced backend cannot run such a call (ValueError where it is ``"persistent"``).
        """
        if batch_size < 0:
            raise ValueError(f"batch_size should be at least 0, got {batch_size}")
        if seq_len < 1:
            raise ValueError(f"seq_len should be at least 1, got {seq_len}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads should be at least 1, got {threads}")
        if self._unusual:
            self._check_options()
        weights = self._weights_in_use()
        device = weights[0].device
        if dtype is None:
            dtype = weights[0].dtype
            autocast_dtype = _autocast_dtype(device.type)
            if autocast_dtype is not None and dtype != torch.float64:
                dtype = autocast_dtype
        if training is None:
            training = _needs_grad(weights)
        return make_plan(
            choice=choose_backend(device, dtype, _transform(weights), self._stack_options()),
            device=device,
            dtype=dtype,
            needs_grad=training,
            options=dataclasses.replace(self._stack_options(), dropout=self._dropout_in_effect()),
            seq_len=seq_len,
            batch_size=batch_size,
            threads=torch.get_num_threads() if threads is None else threads,
        )


# The options that may be tuples. A sequence that is assigned becomes a tuple: a list could change without an assignment.
_MAY_BE_FORMED = frozenset(("hidden_size", "proj_size", "dropout"))


class TorchStackedLSTM(StackedLSTM, nn.LSTM):
    """A :class:`StackedLSTM` that is a ``torch.nn.LSTM`` by ``isinstance``: ``convert_lstm(model, as_lstm=True)`` makes it.

    ``torch.compile`` breaks the graph at it, as it does at an ``nn.LSTM``. Everything else is as in :class:`StackedLSTM`.
    """

    _made_for = nn.LSTM  # both() sets the same attribute in the classes that it makes


def stacked_class(lstm: nn.LSTM, *, as_lstm: bool = False) -> type[StackedLSTM]:
    """The class that an ``nn.LSTM`` becomes: one that keeps what its own class defines."""
    cls = original_class(lstm)
    if only_adds_a_constructor(cls, nn.LSTM) and not (as_lstm and cls is not nn.LSTM):
        return TorchStackedLSTM if as_lstm else StackedLSTM
    return both(cls, TorchStackedLSTM)


def torch_class(stacked: StackedLSTM) -> type[nn.LSTM]:
    """The class that a ``StackedLSTM`` becomes: ``nn.LSTM``, or the subclass of it that it was converted from."""
    cls = original_class(stacked)
    return nn.LSTM if issubclass(cls, StackedLSTM) else cls  # type: ignore[return-value]


def obstacle_to_one_size(stacked: StackedLSTM) -> str:
    """Why a module cannot become an ``nn.LSTM``, which has one size and one rate for all layers; empty if it can."""
    if stacked.link != "plain" and stacked.num_layers > 1:
        return f"its link is {stacked.link!r}, and a torch.nn.LSTM has plain links"
    if not stacked.return_sequences:
        return "its return_sequences is False, and a torch.nn.LSTM returns all steps"
    for name in ("hidden_size", "proj_size", "dropout"):
        value = getattr(stacked, name)
        entries = used_entries(value, stacked.num_layers - (name == "dropout")) if isinstance(value, tuple) else ()
        if len(set(entries)) > 1:
            return f"its {name} is {entries}, and a torch.nn.LSTM has one for all layers"
    return ""


def in_one_size(stacked: StackedLSTM) -> dict[str, Any]:
    """The options of a module without such an obstacle that are tuples, as an ``nn.LSTM`` has them."""
    values = {name: getattr(stacked, name) for name in _MAY_BE_FORMED}
    return {name: value[0] if value else 0.0 for name, value in values.items() if isinstance(value, tuple)}


def _int_of(scalar: Tensor) -> int:
    """The value of ``scalar``; in a program that is compiled or exported, a symbol for it (``int`` would need the number)."""
    value: int = scalar.item()  # type: ignore[assignment]
    return value


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of a value, or of each entry of a tuple."""
    return tuple(function(entry) for entry in value) if isinstance(value, tuple) else function(value)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks for on this device; ``None`` when it is off or unknown there."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: every floating-point tensor except float64."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _needs_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward pass may follow. The gradient mode does not count while tracing: the trace may run under another mode."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return (torch.is_grad_enabled() or tracing) and any(tensor.requires_grad for tensor in tensors)


def _transform(tensors: Sequence[Tensor]) -> str:
    """The transform of this call that a kernel cannot follow, in words; empty if there is none."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform (vmap, grad, jvp, ...) is active"
    # _current_level is private to torch. It only spares ordinary calls the loop: if torch removes it, the loop runs.
    if getattr(forward_ad, "_current_level", 0) >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "forward-mode automatic differentiation is active"
    return ""
