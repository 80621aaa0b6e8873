"""The compiled part, ``_C``; or an error that says why it is not there."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["_C"]

try:
    from . import _C as _C
except ImportError as error:
    here = Path(__file__).resolve().parent
    if not any(here.glob("_C*.so")):
        raise ImportError(
            f"nothing is compiled in {here}, a folder of sources that hides any installed stacked_lstm_ext from a Python "
            "started beside it: start Python elsewhere, or compile in place: pip install --no-build-isolation -e ."
        ) from error
    raise ImportError(
        f"the compiled part of stacked_lstm_ext did not load beside torch {torch.__version__}: {error}. It has to be "
        "built in the environment it runs in: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error
