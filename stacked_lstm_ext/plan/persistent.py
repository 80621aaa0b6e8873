"""The plan of the persistent kernel as a table and as a picture of who works on which (layer, chunk) when.

The kernel itself does not run in this version: ``csrc/persistent.h`` plans it, and everything here is predicted. The GPU need not
be here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..ops import _C
from . import _bytes, _count

__all__ = ["draw_timeline", "format_plan", "format_timeline", "main", "persistent_plan"]

NOTICE = "The persistent kernel does not run in this version: nothing follows this plan, and all times are predicted."
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DEVICES: dict[str, dict[str, Any]] = {device["name"]: device for device in _C.persistent_devices()}


def persistent_plan(
    device: str,
    hidden_sizes: Sequence[int],
    *,
    input_size: int | None = None,
    bidirectional: bool = False,
    seq_len: int = 512,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    training: bool = False,
) -> dict[str, Any]:
    """Plan a stack for a GPU, with its timeline.

    Args:
        device: a name in ``DEVICES``.
        hidden_sizes: H of each layer, which may differ.
        input_size: I; the first layer's H by default.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` (by TF32).
        training: whether the forward pass keeps what backward needs. The backward pass itself is not planned.

    Returns:
        What ``_C.persistent_plan`` returns; ``why_not`` is one sentence if the stack cannot run.
    Raises:
        ValueError: for an unknown device or dtype and for sizes below 1.
    """
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype should be one of {', '.join(ELEMENT_BYTES)}, got: {dtype}")
    first = hidden_sizes[0] if hidden_sizes else 1
    return _C.persistent_plan(
        device,
        first if input_size is None else input_size,
        list(hidden_sizes),
        0,
        bidirectional,
        seq_len,
        batch_size,
        ELEMENT_BYTES[dtype],
        training,
        True,
    )


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table, a row a layer."""
    if plan["why_not"]:
        return f"It could not run: {plan['why_not']}."
    most = max(last - first for first, last in plan["sequences"])
    groups = _count(plan["batch_groups"], "batch group")
    lines = [f"{groups} of at most {_count(most, 'sequence')}; {_count(len(plan['passes']), 'pass', 'es')}"]
    for number, p in enumerate(plan["passes"]):
        where = {
            "block": "h stays in the block",
            "cluster": f"h pushed within clusters of {p['cluster']} blocks",
            "l2": "h through L2, in tagged words",
        }[p["exchange"]]
        rounds = f", in {p['rounds']} rounds" if p["rounds"] > 1 else ""
        lines += [
            "",
            f"pass {number}: {_layers(p)}, {_count(p['blocks'], 'block')} (one an SM), "
            f"{_count(p['copies'], 'batch group')} side by side{rounds}",
            f"  a block  {p['groups']} groups of 8 units × {p['splits']} splits of K = {p['threads']} threads, "
            f"{p['registers_thread']} registers each; {_bytes(p['shared_bytes'])} of shared memory",
            f"  h        {where}; to the next layer in chunks of {_count(p['chunk_steps'], 'step')}",
            "  layer     H  blocks  first  k-steps  W_hh in registers  shared a block  W_ih                  L2       µs a step",
        ]
        for layer in p["layers"]:
            w_ih = f"{_bytes(layer['w_ih_bytes'])} in {layer['w_ih']}"
            lines.append(
                f"  {layer['layer']:5} {layer['hidden']:5} {layer['blocks']:7} {layer['first_block']:6} {layer['k_steps']:8}"
                f"  {_bytes(layer['registers_bytes']):>17}  {_bytes(layer['shared_bytes']):>14}"
                f"  {w_ih:<20}  {_bytes(layer['l2_bytes']):<9} {layer['step_us']:.3f}"
            )
    total = plan["predicted_us"]
    lines += ["", f"predicted   {total:.4g} µs, {plan['step_us']:.3g} µs a step; bound by {_words(plan['binds'])}"]
    for name, us in sorted(plan["terms"].items(), key=lambda term: -term[1]):
        if us >= 0.0005 * total:
            lines.append(f"  {_words(name):<18}{us:10.1f} µs {us / total:6.1%}")
    lines.append(f"no schedule takes less than {plan['limit_us']:.4g} µs (weights once from memory; all multiply-adds)")
    return "\n".join(lines)


def format_timeline(plan: dict[str, Any], width: int = 96) -> str:
    """Who works when, in characters: a row a layer, on the blocks of the first copy."""
    rows = _rows(plan)
    if not rows:
        return ""
    column = plan["predicted_us"] / width
    lines = [f"who works when: a column is {column:.3g} µs, a digit the tenth of its chunks that the layer is at, · nothing"]
    for (number, layer), work in rows.items():
        row = ["·"] * width
        chunks = 1 + max(chunk for chunk, _, _ in work)
        for chunk, start, end in work:
            first = min(int(start / column), width - 1)
            for x in range(first, min(width, max(int(end / column), first + 1))):
                row[x] = str(10 * chunk // chunks)
        lines.append(f"pass {number} layer {layer:3} {''.join(row)}")
    return "\n".join(lines)


def draw_timeline(plan: dict[str, Any], path: Path, title: str) -> None:
    """Draw the same picture with matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _rows(plan)
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.25 * len(rows)), constrained_layout=True)
    for y, work in enumerate(rows.values()):
        spans = [(start, end - start) for _, start, end in work]
        colours = ["#c2410c" if chunk % 2 else "#fdba74" for chunk, _, _ in work]
        axes.broken_barh(spans, (y - 0.4, 0.8), facecolors=colours)
    axes.set_yticks(range(len(rows)), [f"layer {layer}" + (f" (pass {p})" if len(plan["passes"]) > 1 else "") for p, layer in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, plan["predicted_us"])
    axes.set_xlabel("µs, predicted; a change of shade is a change of chunk")
    axes.set_title(f"{title}\nplanned and predicted: the persistent kernel does not run in this version", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _rows(plan: dict[str, Any]) -> dict[tuple[int, int], list[tuple[int, float, float]]]:
    """(pass, layer) -> (chunk, start, end) of what the first copy's blocks do: a batch group a round, direction 0."""
    rows: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for number, group, layer, direction, chunk, _, _, _, _, start, end in plan["timeline"]:
        if group % plan["passes"][number]["copies"] == 0 and direction == 0:
            rows.setdefault((number, layer), []).append((chunk, start, end))
    return rows


def _layers(p: dict[str, Any]) -> str:
    first, last = p["first_layer"], p["last_layer"] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _words(name: str) -> str:
    return {"hand_over": "hand-over", "weights_from_l2": "weights from L2"}.get(name, name)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, got: {text}")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m stacked_lstm_ext.plan",
        description=f"Plan a stack for a GPU, which need not be here. {NOTICE}",
    )
    parser.add_argument("--layers", type=_size, help="how many (default: as many as --hidden names, or 1)")
    parser.add_argument("--hidden", type=_sizes, required=True, help="hidden size, or one a layer: 512 or 512,256,256")
    parser.add_argument("--input", type=_size, help="input size (default: the first hidden size)")
    parser.add_argument("--batch", type=_size, default=8)
    parser.add_argument("--steps", type=_size, default=512)
    parser.add_argument("--dtype", choices=sorted(ELEMENT_BYTES), default="bfloat16", help="float32 runs as TF32")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--training", action="store_true", help="a forward pass that keeps what backward needs")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline (needs matplotlib)")
    options = parser.parse_args(arguments)

    hidden: list[int] = options.hidden
    layers = options.layers or len(hidden)
    if len(hidden) not in (1, layers):
        parser.error(f"--hidden names {len(hidden)} sizes for {layers} layers: give one, or one a layer")
    hidden = hidden * layers if len(hidden) == 1 else hidden
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib, which is not installed (pip install matplotlib)")

    plan = persistent_plan(
        options.device,
        hidden,
        input_size=options.input,
        bidirectional=options.bidirectional,
        seq_len=options.steps,
        batch_size=options.batch,
        dtype=options.dtype,
        training=options.training,
    )
    sizes = str(hidden[0]) if len(set(hidden)) == 1 else ",".join(map(str, hidden))
    device = DEVICES[options.device]
    title = (
        f"{_count(layers, 'layer')}, H {sizes}, B {options.batch}, T {options.steps}, {options.dtype}"
        f"{', bidirectional' * options.bidirectional}{', training (forward only)' * options.training} on {device['full_name']}"
    )
    print(f"{title}, {device['sms']} SMs\n{NOTICE}\n")
    print(format_plan(plan))
    if plan["why_not"]:
        sys.exit(1)
    print(f"\n{format_timeline(plan)}")
    if options.png:
        draw_timeline(plan, options.png, title)
        print(f"\ndrawn: {options.png}")
