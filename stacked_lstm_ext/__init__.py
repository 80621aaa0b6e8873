"""A stacked LSTM that runs as a wavefront: a drop-in for ``torch.nn.LSTM``.

    >>> from stacked_lstm_ext import StackedLSTM, convert_lstm
    >>> lstm = StackedLSTM(input_size=64, hidden_size=256, num_layers=8)
    >>> model = convert_lstm(model)  # or swap every nn.LSTM inside a model

``lstm.plan(batch_size, seq_len)`` says what a call would run and why, ``last_run()`` what ran, and ``with
backend(name):`` forces it. ``python -m stacked_lstm_ext`` prints what was built.
"""

from __future__ import annotations

from . import init
from .convert import LSTMReport, ReportedLSTM, convert_lstm, lstm_report, revert_lstm
from .flops import register_flop_formulas
from .module import StackedLSTM
from .ops import _C
from .plan import Plan, backend, last_run
from .states import StackStates

__all__ = [
    "LSTMReport",
    "Plan",
    "ReportedLSTM",
    "StackStates",
    "StackedLSTM",
    "__version__",
    "backend",
    "convert_lstm",
    "init",
    "last_run",
    "lstm_report",
    "revert_lstm",
]

register_flop_formulas()

__version__: str = _C.build_info()["version"]
