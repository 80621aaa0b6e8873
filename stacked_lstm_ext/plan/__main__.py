"""``python -m stacked_lstm_ext.plan``: what the persistent kernel would do with a stack on a GPU. Everything is predicted."""

from .persistent import main

main()
