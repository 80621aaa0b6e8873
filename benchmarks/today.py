"""How the options of a stack are had without them: contestants that stand beside ours in ``costs.py``.

Each computes what the case asks for, by its results and gradients, and is verified like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import stacked_lstm_ext
from benchmarks.cases import Case, Problem
from benchmarks.contestants import Contestant, Prepared, Tensors, eps_of_a_loop, leaves, prepare_function, states_of_layers
from benchmarks.results import Mode


class OnePerLayer(Contestant):
    """A module for each layer, and between them what the link says: for every layer's h, for links, for layers of different widths.

    It has no cell states but the last ones.
    """

    def __init__(self, module_type: type[nn.LSTM] | type[stacked_lstm_ext.StackedLSTM]) -> None:
        self.module_type = module_type
        self.ours = module_type is not nn.LSTM
        self.name = f"{'StackedLSTM' if self.ours else 'nn.LSTM'}, one a layer"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        for option, asked in (
            ("lengths", case.packed or case.padded),
            ("resets", case.resets is not None),
            ("single steps", case.streamed),
            ("last steps", case.last_step),
            ("cell states", "cell" in case.results),
        ):
            if asked:
                return f"no {option}"
        return None

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        case = problem.case
        stack: list[Any] = []
        for k, (width, hidden) in enumerate(zip(case.layer_inputs(), case.hidden_sizes)):
            options: dict[str, Any] = {"proj_size": case.proj_size, "bidirectional": case.bidirectional}
            layer = self.module_type(width, hidden, **options, device=problem.device, dtype=problem.dtype)
            suffixes = ("", "_reverse")[: case.directions]
            own = [weight for suffix in suffixes for weight in problem.layer_weights(k, suffix)]
            layer.load_state_dict(dict(zip((name for name, _ in layer.named_parameters()), own)))
            stack.append(layer.train(mode == "training"))
        x, h_0, c_0 = leaves(problem, mode)

        def forward() -> dict[str, Any]:
            hidden: list[Tensor] = []
            h_n: list[Tensor] = []
            c_n: list[Tensor] = []
            u = x
            for k, (layer, state) in enumerate(zip(stack, zip(*states_of_layers(problem, h_0, c_0)))):
                if k > 0:
                    below = hidden[-1]
                    if case.link == "residual" and k > 1:
                        below = below + u
                    u = torch.cat([below, x], -1) if case.link == "skip" else below
                h, (last_h, last_c) = layer(u, state)
                hidden.append(h)
                h_n.append(last_h)
                c_n.append(last_c)
            output = hidden[-1]
            if case.link == "residual" and case.layers > 1:
                output = output + u
            elif case.link == "skip":
                output = torch.cat(hidden, -1)
            whole: dict[str, Any] = {"output": output, "hidden": hidden}
            return whole | ({"h_n": h_n, "c_n": c_n} if case.widths else {"h_n": torch.cat(h_n), "c_n": torch.cat(c_n)})

        def gradients() -> Tensors:
            named = ((name.replace("_l0", f"_l{k}"), p.grad) for k, layer in enumerate(stack) for name, p in layer.named_parameters())
            return {name: grad for name, grad in named if grad is not None}

        parameters = [parameter for layer in stack for parameter in layer.parameters()]
        return prepare_function(forward, problem, mode, (x, h_0, c_0), parameters, gradients)


class PackAndPad(Contestant):
    """``nn.LSTM`` on a padded batch with lengths: packed in front of it, padded behind it."""

    name = "nn.LSTM, packed and padded"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        return None if case.padded and case.link == "plain" and not case.widths else "for lengths alone"

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        case = problem.case
        module = stock(problem, mode)
        x, h_0, c_0 = leaves(problem, mode)
        lengths = problem.lengths
        assert lengths is not None

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, (h_n, c_n) = module(packed, (h_0, c_0))
            return pad_packed_sequence(output, total_length=case.steps)[0], h_n, c_n

        return prepare_function(forward, problem, mode, (x, h_0, c_0), list(module.parameters()), lambda: gradients_of(module))


class SplitAtResets(Contestant):
    """Every sequence cut into pieces at its resets, the pieces padded to the longest one, as one batch of ``nn.LSTM``.

    So does reinforcement-learning code: TorchRL's ``LSTMModule`` by default. What the pieces are is found at each call, since
    every batch has other resets. ``nn.LSTM`` runs on through the padding, so that the last c of a sequence is not known.
    """

    name = "nn.LSTM, split and padded"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if "c_n" in case.results:
            return "the last c is not known"
        one_layer = case.resets is not None and case.layers == 1 and not (case.bidirectional or case.padded or case.last_step)
        return None if one_layer else "for resets of one layer alone"

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        case, resets = problem.case, problem.resets
        module = stock(problem, mode)
        x, h_0, c_0 = leaves(problem, mode)
        assert resets is not None
        time = torch.arange(case.steps, device=problem.device)

        def forward() -> dict[str, Tensor]:
            begins = resets.t().clone()
            begins[:, 0] = True
            piece = begins.flatten().cumsum(0) - 1  # of each (sequence, step), sequences one after the other
            began = torch.where(begins, time, 0).cummax(1).values
            place = (time - began).flatten()  # in its piece
            pieces, longest = int(piece[-1]) + 1, int(place.max()) + 1
            padded = x.new_zeros(longest, pieces, case.input_size).index_put((place, piece), x.transpose(0, 1).flatten(0, 1))
            known = (~resets[0]).nonzero().flatten()  # sequences whose initial state counts
            first = piece[known * case.steps]
            states = (s.new_zeros(1, pieces, s.size(-1)).index_copy(1, first, s.index_select(1, known)) for s in (h_0, c_0))
            output, _ = module(padded, tuple(states))
            output = output[place, piece].unflatten(0, (case.batch, case.steps)).transpose(0, 1)
            return {"output": output, "h_n": output[-1:]}

        return prepare_function(forward, problem, mode, (x, h_0, c_0), list(module.parameters()), lambda: gradients_of(module))


class CellLoop(Contestant):
    """A loop over the steps with an ``nn.LSTMCell`` for each layer, and states zeroed where a sequence is reset."""

    name = "nn.LSTMCell, step by step"

    def obstacle(self, case: Case, mode: Mode, dtype: torch.dtype, device: torch.device) -> str | None:
        if case.resets is None or case.bidirectional or case.padded or case.proj_size or case.widths or case.link != "plain":
            return "for resets alone"
        return None

    def eps(self, case: Case, mode: Mode, dtype: torch.dtype) -> float | None:
        return eps_of_a_loop(case, mode, dtype)

    def prepare(self, problem: Problem, mode: Mode, threads: int) -> Prepared:
        case, resets = problem.case, problem.resets
        cells = nn.ModuleList()
        for k, width in enumerate(case.layer_inputs()):
            cell = nn.LSTMCell(width, case.hidden_size, device=problem.device, dtype=problem.dtype)
            cell.load_state_dict(dict(zip((name for name, _ in cell.named_parameters()), problem.layer_weights(k))))
            cells.append(cell)
        x, h_0, c_0 = leaves(problem, mode)
        assert resets is not None

        def forward() -> tuple[Tensor, Tensor, Tensor]:
            kept = (~resets).to(x.dtype).unsqueeze(-1)
            h, c = list(h_0.unbind(0)), list(c_0.unbind(0))
            outputs = []
            for y, keep in zip(x.unbind(0), kept.unbind(0)):
                for k, cell in enumerate(cells):
                    y, c[k] = cell(y, (h[k] * keep, c[k] * keep))
                    h[k] = y
                outputs.append(y)
            return torch.stack(outputs), torch.stack(h), torch.stack(c)

        def gradients() -> Tensors:
            named = ((f"{name}_l{k}", p.grad) for k, cell in enumerate(cells) for name, p in cell.named_parameters())
            return {name: grad for name, grad in named if grad is not None}

        return prepare_function(forward, problem, mode, (x, h_0, c_0), list(cells.parameters()), gradients)


def stock(problem: Problem, mode: Mode) -> nn.LSTM:
    """``nn.LSTM`` with the problem's weights."""
    case = problem.case
    options: dict[str, Any] = {"proj_size": case.proj_size, "bidirectional": case.bidirectional}
    module = nn.LSTM(case.input_size, case.hidden_size, case.layers, **options, device=problem.device, dtype=problem.dtype)
    module.load_state_dict(problem.weights)
    return module.train(mode == "training")


def gradients_of(module: nn.Module) -> Tensors:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
