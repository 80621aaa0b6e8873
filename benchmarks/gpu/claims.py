"""What is claimed of a GPU: the shapes of the targets and floors, and the bounds that they are held to.

``cells.py`` makes the shapes that are measured of these numbers, ``report.py`` judges by them; it does not import torch, which
may hang where a driver is broken.
"""

from __future__ import annotations

# The targets, for the persistent kernel: one layer of the shape that FlashRNN's authors and others have published, a grid, and a
# series of depths; T steps of 16-bit values.
ONE_LAYER = (1, 16, 1024, 768)  # L, B, T, H
ONE_LAYER_MS = {"inference": (1.5, 1.0), "training": (4.2, 3.0)}  # at most; and what it aims at
TARGET_STEPS = 512
TARGET_LAYERS, TARGET_WIDTHS, TARGET_BATCHES = (4, 8), (256, 512, 1024), (1, 8, 32)
TARGET_LEAST, TARGET_MEAN = 2.0, 4.0  # times as fast as nn.LSTM on the grid: everywhere, and as geometric mean
DEPTHS = (1, 2, 4, 8, 16)
DEPTH_BATCH, DEPTH_WIDTH = 8, 256
DEPTH_MOST = 1.5  # the deepest one's time over that of one layer
FLASHRNN = "FlashRNN (cuda_fused)"
FLASHRNN_LEAST = 3.0  # times as fast, on the one layer

# The floors: from so many layers on, in 16 bits, ours is nowhere to be slower than nn.LSTM.
FLOOR_LAYERS = 4
SIXTEEN_BITS = ("bfloat16", "float16")
HOST_MOST_US = 60.0
PACKED_MOST = 1.2  # a packed batch's time over that of the padded one

TARGET_ROWS = len(TARGET_LAYERS) * len(TARGET_WIDTHS) * len(TARGET_BATCHES) * len(SIXTEEN_BITS)  # of a mode
DEPTH_ENDS = tuple((layers, DEPTH_BATCH, TARGET_STEPS, DEPTH_WIDTH) for layers in (DEPTHS[0], DEPTHS[-1]))  # L, B, T, H
