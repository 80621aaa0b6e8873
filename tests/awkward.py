"""Sizes, strides and addresses that have broken LSTM kernels, or would break a careless one: every kernel gets all of them."""

import torch

AWKWARD = [  # layers, batch, steps, input, hidden: each row has broken an LSTM kernel somewhere
    (1, 1, 1, 1, 1),  # nothing to overlap
    (3, 2, 2, 5, 7),  # fewer steps than layers: the wavefront never fills
    (2, 17, 9, 33, 65),  # no size a multiple of a tile
    (30, 1, 40, 8, 8),  # far more layers than workers
    (2, 3, 3, 17, 129),  # one more than a power of two
    (1, 1, 65, 129, 17),  # a wide input, a narrow layer
    (2, 65, 3, 1, 15),  # one feature
    (3, 129, 5, 31, 33),  # a batch that no slice divides
    (2, 8, 16, 32, 32),  # every size a multiple of a tile
    (1, 2, 3, 16, 1023),  # a hidden size of almost a thousand: its rows are split over workers
    (1, 2, 3, 1023, 16),  # an input of almost a thousand
    (2, 1023, 2, 3, 3),  # a batch of almost a thousand
    (2, 1, 1023, 3, 3),  # almost a thousand steps
    (1, 8, 60, 40, 112),  # weight gradients summed in blocks of rows, parts of which are copied
    (3, 3, 301, 3, 9),  # more rows than the ring of gate gradients has: it comes round, within blocks and chunks
    (2, 17, 61, 5, 9),
    (2, 65, 21, 3, 6),
    (1, 129, 9, 3, 5),
    (1, 1023, 4, 3, 3),  # a block of one step
]


def transposed(t):
    return t.detach().transpose(0, -1).contiguous().transpose(0, -1)


def sliced(dim):
    def view(t):
        shape = list(t.shape)
        shape[dim] *= 2
        wide = torch.full(shape, float("nan"), dtype=t.dtype)
        picked = wide.index_select(
            dim, torch.tensor([0])
        )  # keeps the NaN around the slice: what is read beside it shows
        assert picked.isnan().all()
        index = [slice(None)] * t.dim()
        index[dim] = slice(0, None, 2)
        wide[tuple(index)] = t.detach()
        return wide[tuple(index)]

    return view


def misaligned(t):
    store = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype)
    store[1:-2] = t.detach().flatten()
    return store[1:-2].view(t.shape)


def strided(fn):
    def apply(t):
        view = fn(t)
        assert torch.equal(view, t.detach())
        return view

    return apply


LAYOUTS = [
    ("transposed", transposed),
    ("every other of the first dimension", sliced(0)),
    ("every other of the last dimension", sliced(-1)),
    ("an odd address", misaligned),
]
TARGETS = ["input", "h_0", "c_0", "weights", "upstream"]
