"""The definition: a stacked LSTM in plain torch operations.

Every kernel of this package is compared with :func:`states_reference` run in float64. The function also runs what no
kernel can: second derivatives, forward-mode differentiation, ``torch.func`` transforms, and dtypes that have no kernel.
So it may use neither in-place operations nor control flow that depends on a tensor's contents (the one exception is
``batch_sizes``, which lives on the CPU). It is written to be read, not to be fast.

    i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)      a = W_ih u + b_ih + W_hh h + b_hh, gate order i, f, g, o
    c' = f·c + i·g            h' = W_hr (o·tanh(c'))          W_hr only in a layer with a projection

Layer k reads u_k; x is the input of the stack, m_k the mask of the dropout behind layer k:

    link        u_0   u_1       u_(k+1), k ≥ 1         output
    plain       x     m_0·h_0   m_k·h_k                h_(L-1)
    residual    x     m_0·h_0   m_k·h_k + u_k          h_(L-1) + u_(L-1)     if L ≥ 2
    skip        x     [m_0·h_0, x]   [m_k·h_k, x]      [h_0, …, h_(L-1)]

Sources: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; the projection of Sak et al. 2014;
residual links of Wu et al. 2016 (GNMT); skip links of Graves 2013; dropout masks by Philox4x32-10 of Salmon et al. 2011.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .layout import for_each_layer, state_layouts, weights_of_stack

__all__ = ["dropout_mask", "lstm_reference", "philox_4x32_10", "round_to_bf16", "states_reference"]


def lstm_reference(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int | tuple[int, ...],
    dropout: float | tuple[float, ...],
    link: str = "plain",
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a stacked LSTM; the arguments are those of the operator ``stacked_lstm_ext::forward``.

    Tensors of 32 bits and more are computed in their own dtype; narrower ones in float32 throughout, with one rounding
    of each result at the end.

    Args:
        input: ``(T, B, I)``, time-major; or, with ``batch_sizes``, the data ``(rows, I)`` of a ``PackedSequence``.
        batch_sizes: ``None``, or the int64 CPU tensor ``(T,)`` of a ``PackedSequence``.
        h_0: ``(D·L, B, out)``, where out_k is P_k, or H_k without a projection; in sorted batch order when packed. If the
            layers differ in out, it is flat: the parts ``(D, B, out_k)`` one after the other (:class:`.layout.StateLayout`).
        c_0: ``(D·L, B, H)``, likewise: flat if the layers differ in H.
        weights: in the order of ``nn.LSTM._flat_weights``: for each layer, for each direction, ``weight_ih``,
            ``weight_hh``, ``bias_ih`` and ``bias_hh`` if ``bias``, ``weight_hr`` if the layer has a projection. They say H_k.
        seed: one int64 on the input's device; needed when a dropout is in effect.
        bias: whether ``weights`` has biases.
        num_layers: L.
        bidirectional: whether D is 2.
        proj_size: P, or 0 for no projection; a tuple has one for each layer.
        dropout: the rate in effect between layers, 0 when evaluating; a tuple has one for each boundary, L-1.
        link: what a layer reads of the layers below: ``"plain"``, ``"residual"`` or ``"skip"``.
        lengths: ``None``, or, of a padded batch, how many steps each sequence has: int64 ``(B,)`` on the CPU, in any order.
            What is behind a sequence's end is not read, and results are zero there.
        resets: ``None``, or, of a padded batch, bool ``(T, B)``: true resets a sequence between the steps t-1 and t, so that no
            state crosses, in either direction; at t = 0 it puts zeros in the place of h_0 and c_0 of the forward direction.

    Returns:
        ``(output, h_n, c_n)``: output ``(T, B, D·out)`` of the last layer (with skip links, of all layers, side by side), or
        ``(rows, D·out)`` when packed; ``h_n`` and ``c_n`` shaped as ``h_0`` and ``c_0``.

    Raises:
        ValueError: if ``dropout`` is in effect and there is no ``seed``.
    """
    stack = (bias, num_layers, bidirectional, proj_size, dropout, link)
    output, h_n, c_n, _, _ = states_reference(input, batch_sizes, h_0, c_0, weights, seed, *stack, lengths=lengths, resets=resets)
    return output, h_n, c_n


def states_reference(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    seed: Tensor | None,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    proj_size: int | tuple[int, ...],
    dropout: float | tuple[float, ...],
    link: str = "plain",
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """:func:`lstm_reference` with everything that the stack knows: the operator ``stacked_lstm_ext::forward_states``.

    Returns:
        ``(output, h_n, c_n, hidden, cell)``: the last two are lists with each layer's h, ``(T, B, D·out_k)``, before
        dropout, and its c, ``(T, B, D·H_k)``; ``(rows, ...)`` when packed. The other results, the arguments and the errors
        are those of :func:`lstm_reference`.
    """
    proj_sizes, dropouts = for_each_layer(proj_size, num_layers), for_each_layer(dropout, num_layers - 1)
    if any(dropouts) and seed is None:
        raise ValueError(f"dropout={dropout} between {num_layers} layers needs a seed, got None")
    dtype = input.dtype
    if dtype.itemsize < torch.float32.itemsize:
        input, h_0, c_0 = input.float(), h_0.float(), c_0.float()
        weights = [weight.float() for weight in weights]

    directions = 2 if bidirectional else 1
    steps, batch = (input.size(0), input.size(1)) if batch_sizes is None else (batch_sizes.numel(), int(batch_sizes[0]))
    h_layout, c_layout = state_layouts([weight.shape for weight in weights], bias, directions, proj_sizes)
    named: list[list[dict[str, Tensor]]] = [[{} for _ in range(directions)] for _ in range(num_layers)]
    for weight, (layer, direction, kind) in zip(weights, weights_of_stack(bias, directions, proj_sizes), strict=True):
        named[layer][direction][kind] = weight

    # Sequences sorted by length, the longest first. `sizes` says how many of them each step has.
    order = None
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
    elif lengths is None:
        sizes = [batch] * steps
    else:
        order = lengths.sort(descending=True, stable=True).indices
        sizes = [int((lengths > t).sum()) for t in range(steps)]
    here = None if order is None else order.to(input.device)

    def in_order(tensor: Tensor, dim: int = 1) -> Tensor:
        return tensor if here is None else tensor.index_select(dim, here)

    # One row for each (step, sequence) that exists, so that padded and packed input are treated alike.
    if batch_sizes is not None:
        rows = input
    elif lengths is None:
        rows = input.flatten(0, 1)
    else:
        rows = torch.cat([step[:size] for step, size in zip(in_order(input).unbind(0), sizes, strict=True)])
    resets_at = None if resets is None else in_order(resets).unbind(0)

    def result(rows: Tensor) -> Tensor:
        if batch_sizes is None and lengths is None:
            rows = rows.unflatten(0, (steps, batch))
        elif here is not None:
            padded = [functional.pad(step, (0, 0, 0, batch - size)) for step, size in zip(rows.split(sizes), sizes, strict=True)]
            rows = torch.stack(padded).index_select(1, here.argsort())
        return rows.to(dtype)

    def masked(rows: Tensor, layer: int) -> Tensor:
        rate = dropouts[layer]
        if rate == 0:
            return rows
        assert seed is not None
        keep = dropout_mask(seed, layer, _element_rows(sizes, batch, rows.device), rows.size(-1), rate)
        # A product, not a selection: NaN and Inf in a dropped element then show in the result, as in torch.
        return rows * (keep.to(rows.dtype) * (1 / (1 - rate) if rate < 1 else 0.0))

    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    hidden: list[Tensor] = []
    cell: list[Tensor] = []
    x = u = rows
    for layer, (h, c) in enumerate(zip(h_layout.split(h_0, batch), c_layout.split(c_0, batch), strict=True)):
        if layer > 0:
            below = masked(hidden[-1], layer - 1)
            if link == "residual" and layer > 1:
                below = below + u
            u = torch.cat([below, x], dim=-1) if link == "skip" else below
        h, c = in_order(h), in_order(c)
        runs = [_run_direction(u, sizes, h[d], c[d], named[layer][d], resets_at, reverse=d == 1) for d in range(directions)]
        all_h, all_c, last_h, last_c = zip(*runs, strict=True)
        hidden.append(torch.cat(all_h, dim=-1))
        cell.append(torch.cat(all_c, dim=-1))
        h_n.append(torch.stack(last_h))
        c_n.append(torch.stack(last_c))

    if link == "residual" and num_layers > 1:
        output = hidden[-1] + u
    else:
        output = torch.cat(hidden, dim=-1) if link == "skip" else hidden[-1].clone()  # a result shares no memory with another
    if here is not None:
        h_n, c_n = ([state.index_select(1, here.argsort()) for state in layers] for layers in (h_n, c_n))
    last = h_layout.join(h_n).to(dtype), c_layout.join(c_n).to(dtype)
    return result(output), *last, [result(h) for h in hidden], [result(c) for c in cell]


def _run_direction(
    rows: Tensor,
    sizes: list[int],
    h_0: Tensor,
    c_0: Tensor,
    weights: Mapping[str, Tensor],
    resets_at: Sequence[Tensor] | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer: ``rows`` (all steps) in; all h, all c, and the last h and c of every sequence, out.

    ``sizes`` (the sequences alive at each step) never grows with time. Forwards, sequences therefore leave at the end
    of the batch; in reverse they join there, each from its own initial state. ``resets_at[t]`` says which sequences are reset between
    the steps t-1 and t.
    """
    w_hh, b_hh, w_hr = weights["weight_hh"], weights.get("bias_hh"), weights.get("weight_hr")
    inputs = functional.linear(rows, weights["weight_ih"], weights.get("bias_ih")).split(sizes)
    steps = range(len(sizes))
    alive = sizes[-1] if reverse else sizes[0]
    h, c = h_0[:alive], c_0[:alive]
    all_h: list[Tensor] = []
    all_c: list[Tensor] = []
    ended_h: list[Tensor] = []
    ended_c: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        if sizes[t] < alive:
            ended_h.append(h[sizes[t] :])
            ended_c.append(c[sizes[t] :])
            h, c = h[: sizes[t]], c[: sizes[t]]
        if resets_at is not None and not (reverse and t + 1 == len(sizes)):
            # A selection, not a product: not even NaN crosses a reset. A sequence that joins at this step has crossed nothing.
            reset = resets_at[t + 1 if reverse else t][: h.size(0)].unsqueeze(-1)
            h, c = h.masked_fill(reset, 0.0), c.masked_fill(reset, 0.0)
        if sizes[t] > alive:
            h = torch.cat([h, h_0[alive : sizes[t]]])
            c = torch.cat([c, c_0[alive : sizes[t]]])
        alive = sizes[t]

        i, f, g, o = (inputs[t] + functional.linear(h, w_hh, b_hh)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if w_hr is not None:
            h = functional.linear(h, w_hr)
        all_h.append(h)
        all_c.append(c)

    if reverse:
        all_h.reverse()
        all_c.reverse()
    return torch.cat(all_h), torch.cat(all_c), torch.cat([h, *reversed(ended_h)]), torch.cat([c, *reversed(ended_c)])


def _element_rows(sizes: list[int], batch: int, device: torch.device) -> Tensor:
    """For every row that exists, its number ``t·B + b`` in the padded layout: int64 ``(rows,)``."""
    return torch.cat([torch.arange(size, device=device) + t * batch for t, size in enumerate(sizes)])


def round_to_bf16(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights that the products of a stack with ``bf16_weights`` use: matrices rounded to bfloat16, in their own dtype.

    Biases stay as they are. The gradient of the rounded matrix is that of the matrix itself ("straight through"): the
    sum below differs from the matrix by a constant, and it is exact.
    """

    def rounded(weight: Tensor) -> Tensor:
        if weight.dim() != 2 or weight.dtype == torch.bfloat16:
            return weight
        exact = weight.detach()
        return weight + (exact.to(torch.bfloat16).to(weight.dtype) - exact).nan_to_num(0.0, torch.inf, -torch.inf)

    return [rounded(weight) for weight in weights]


def dropout_mask(seed: Tensor, layer: int, element_rows: Tensor, width: int, dropout: float) -> Tensor:
    """Which elements of a layer's output are kept: bool ``(rows, width)``.

    Element j of the row numbered n draws word ``j % 4`` of the Philox block with the counter ``(e, e >> 32, layer,
    0)``, ``e = n·⌈width/4⌉ + j // 4``, under the key ``(seed, seed >> 32)``, and is kept if that word is at least
    ``⌊dropout · 2³²⌋``. So a mask depends only on the seed and the element's position. It does not depend on the
    schedule, on the number of threads, or on whether the batch is packed.

    Args:
        seed: one int64.
        layer: the layer whose output is masked, from 0.
        element_rows: int64 ``(rows,)``, ``t·B + b`` of each row in the padded layout.
        width: features in a row, both directions together.
        dropout: probability of an element being dropped, in [0, 1].
    """
    blocks = (width + 3) // 4
    element = element_rows.unsqueeze(-1) * blocks + torch.arange(blocks, device=element_rows.device)
    seed = seed.reshape(())
    words = philox_4x32_10(
        (element & _WORD, element >> 32, torch.full_like(element, layer), torch.zeros_like(element)),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :width] >= int(dropout * 2**32)


_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011): four random 32-bit words for every counter.

    Words are held in int64 tensors, each in [0, 2³²), and broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = _multiply_32(c0, _MULTIPLIERS[0])
        high_1, low_1 = _multiply_32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply_32(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two 32-bit words, 16 bits at a time: int64 would overflow."""
    low = (word & 0xFFFF) * factor
    middle = (word >> 16) * factor + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
