"""The plan of the persistent kernels as a table, and as a picture of when each layer works on which chunk.

``csrc/persistent/planner.cpp`` makes the plan; the GPU need not be present. All times are predicted, from published figures or
from figures that ``make gpu`` has measured (:func:`read_costs`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..ops import _C
from . import _bytes, _count

__all__ = ["draw_timeline", "format_plan", "format_timeline", "main", "persistent_plan", "read_costs", "with_clusters_of_16"]

NOTICE = "All times are predicted by a cost model; none was measured."
FORMATS = {"bfloat16": (2, "tensor"), "float16": (2, "tensor"), "float32": (4, "exact"), "tf32": (4, "tensor")}
DEVICES: dict[str, dict[str, Any]] = {device["name"]: device for device in _C.persistent_devices()}


def persistent_plan(
    device: str | dict[str, Any],
    hidden_sizes: Sequence[int],
    *,
    input_size: int | None = None,
    bidirectional: bool = False,
    seq_len: int = 512,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    saving: str = "none",
    costs: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Plan a stack for a GPU, by the persistent kernels and by diagonals, with timelines.

    Args:
        device: a name in ``DEVICES``, or a dictionary like its values.
        hidden_sizes: H of each layer, which may differ.
        input_size: I; the first layer's H by default.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"`` (exact products) or ``"tf32"`` (float32, multiplied as TF32).
        saving: ``"none"`` (forward alone), ``"full"`` or ``"recompute"``: what forward keeps for backward.
        costs: figures in the place of the built-in ones, as :func:`read_costs` returns them.

    Returns:
        What ``_C.persistent_choice`` returns: the plans ``forward`` and ``backward`` (if there is no plan, its ``why_not`` is
        one sentence), ``diagonal_forward`` and ``diagonal_backward``; and ``persistent``, whether the persistent kernels are
        predicted to be faster, with a ``reason``.
    Raises:
        ValueError: for an unknown device, dtype or cost, and for sizes below 1.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dtype should be one of {', '.join(FORMATS)}, got: {dtype}")
    element_bytes, product = FORMATS[dtype]
    first = hidden_sizes[0] if hidden_sizes else 1
    return _C.persistent_choice(
        device,
        first if input_size is None else input_size,
        list(hidden_sizes),
        0,
        bidirectional,
        seq_len,
        batch_size,
        element_bytes,
        product=product,
        saving=saving,
        timeline=True,
        costs=costs or {},
    )


def with_clusters_of_16(device: dict[str, Any], count: int) -> dict[str, Any]:
    """A GPU of this model whose chip holds ``count`` clusters of 16 blocks at once: its other GPCs have fewer than 16 SMs.

    Raises:
        ValueError: if the model cannot hold as many.
    """
    if device["max_cluster"] < 16:
        raise ValueError(f"{device['name']} has no clusters of 16 blocks, got: {count}")
    if not 0 <= count <= device["gpcs"]:
        raise ValueError(f"{device['name']} holds 0 to {device['gpcs']} clusters of 16 blocks, got: {count}")
    return device | {"short_gpcs": device["gpcs"] - count, "sms_short_gpc": device["sms_short_gpc"] or 8}


# --------------------------------------------------------------------------------------------------------------------
# Costs that were measured
# --------------------------------------------------------------------------------------------------------------------

_ONE_FIGURE = {  # of the model, as benchmarks/primitives.cu reports them: name, unit, and factor to the unit here
    "hand_over_us": ("2 KiB and a flag through L2, block to block", "ns", 1e-3),
    "l2_latency": ("latency of L2", "cycles", 1.0),
    "shared_rate": ("reads from shared memory", "bytes/cycle", 1.0),
    "mma_latency": ("latency of mma m16n8k16 bf16", "cycles", 1.0),
    "barrier": ("barrier of 256 threads", "cycles", 1.0),
    "host_launch_us": ("a launch, on the host", "ns", 1e-3),
}
_MMA_WORK = 16 * 8 * 16  # multiply-adds of one mma.sync
# Predicted, in microseconds: the time of a small product beyond that of an empty kernel, and the time that the host takes to
# queue a product of ATen beyond that of a launch.
_SMALL_PRODUCT_US, _ATEN_US = 1.0, 3.0


def read_costs(path: Path, device: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of the cost model from a result file of ``make gpu`` (its part "primitives").

    Args:
        path: the JSON file.
        device: the GPU that it was measured on, as in ``DEVICES``.

    Returns:
        The measured costs by name, and the device with its measured rates. Figures that the file does not hold stay as
        they were.
    Raises:
        ValueError: for a file without figures of primitives, and for impossible figures.
    """
    try:
        figures = json.loads(path.read_text())["primitives"]["figures"]
        assert isinstance(figures, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no result file of `make gpu` with figures of its primitives: {error!r}") from error

    def median(name: str, unit: str) -> float | None:
        figure = figures.get(name)
        if figure is None or "error" in figure or figure.get("wrong"):
            return None
        if figure["unit"] != unit or not figure["median"] > 0:
            raise ValueError(f"{path}: {name!r} should be a number of {unit} above 0, got: {figure['median']} {figure['unit']}")
        return float(figure["median"])

    costs, measured = {}, dict(device)
    for cost, (name, unit, scale) in _ONE_FIGURE.items():
        if (value := median(name, unit)) is not None:
            costs[cost] = value * scale
    clock_ghz = device["clock_mhz"] / 1e3
    if (one_way := median("tagged word through L2, one way", "ns")) is not None:
        # When all of its threads have their words, the receiving block waits at one more barrier.
        costs["l2_us"] = one_way / 1e3 + costs.get("barrier", _C.persistent_costs()["barrier"]) / clock_ghz / 1e3
    if (rate := median("reads from L2, all multiprocessors, 8 MiB", "GB/s")) is not None:
        costs["l2_rate"] = rate / device["sms"] / clock_ghz
    if (rate := median("mma m16n8k16 bf16, one multiprocessor", "mma/cycle")) is not None:
        measured["mma_share"] = min(rate * _MMA_WORK / device["mma_rate"], 1.0)
    if (gap := median("an empty kernel in a stream", "ns")) is not None:
        costs["kernel_us"] = gap / 1e3 + _SMALL_PRODUCT_US
    if "host_launch_us" in costs:
        costs["host_product_us"] = costs["host_launch_us"] + _ATEN_US

    # The exchange in a cluster: a straight line through the points (bytes that a block received, time that it took).
    points = []
    for name in figures:
        if found := re.fullmatch(r"exchange by st.async, (\d+) blocks, (\d+) bytes each", name):
            blocks, share = map(int, found.groups())
            if (time := median(name, "ns")) is not None:
                points.append((blocks * share, time))
    if len({size for size, _ in points}) > 1:
        mean_size, mean_time = (sum(column) / len(points) for column in zip(*points, strict=True))
        slope = sum((size - mean_size) * (time - mean_time) for size, time in points)
        slope /= sum((size - mean_size) ** 2 for size, _ in points)
        start = mean_time - slope * mean_size
        if slope <= 0 or start <= 0:
            raise ValueError(f"{path}: exchanges in a cluster should take longer for more bytes, and some time for none")
        costs["cluster_us"], costs["cluster_rate"] = start / 1e3, 1 / slope / clock_ghz
    if not costs:
        raise ValueError(f"{path} holds no figure that the cost model knows")
    return costs, measured


# --------------------------------------------------------------------------------------------------------------------
# In words and pictures
# --------------------------------------------------------------------------------------------------------------------


def format_plan(plan: dict[str, Any]) -> str:
    """One of the two plans, forward or backward, as a table with a row for each layer."""
    if plan["why_not"]:
        return f"the persistent kernel cannot run it: {plan['why_not']}."
    lines = [_count(len(plan["passes"]), "pass", "es") + (", the last first" if plan["backward"] else "")]
    for number, p in enumerate(plan["passes"]):
        cut = p["cut"]
        exchanged = "partial sums of dh" if plan["backward"] else "h"
        where = (
            f"pushed within clusters of {_count(cut['blocks'], 'block')}"
            if cut["exchange"] == "cluster"
            else "kept in the layer's one block"
            if cut["blocks"] == 1
            else "through L2, in tagged words"
        )
        most = max(last - first for first, last in p["sequences"])
        groups = f"{_count(p['batch_groups'], 'batch group')} of at most {_count(most, 'sequence')}"
        rounds = f", in {p['rounds']} rounds" if p["rounds"] > 1 else ""
        segments = f", in {p['segments']} launches of at most {_count(p['segment_steps'], 'step')}" if p["segments"] > 1 else ""
        if p["products_beside"]:
            segments += ", weight gradients beside what comes after them"
        warps = (
            f"each of 8 warps {_count(cut['m_tiles'], 'tile')} of 16 of the layer's units"
            if plan["backward"]
            else f"× {_count(cut['splits'], 'split')} of K"
        )
        lines += [
            "",
            f"pass {number}: {_layers(p)}, {_count(p['blocks'], 'block')} (one an SM); {groups}, {p['copies']} side by side"
            f"{rounds}{segments}",
            f"  a block  {_count(cut['groups'], 'group')} of 8 units, {warps}; {p['threads']} threads of {p['registers_thread']} "
            f"registers, {p['weight_registers']} of them weights; {_bytes(p['shared_bytes'])} of shared memory",
            f"  {exchanged}  {where}; from layer to layer in chunks of {_count(cut['chunk_steps'], 'step')}",
            "  layer     H  blocks  first  W_hh in registers  W_ih                  µs a step",
        ]
        for layer in p["layers"]:
            w_ih = f"{_bytes(layer['w_ih_bytes'])} in {layer['w_ih']}" if layer["w_ih_bytes"] else "–"
            lines.append(
                f"  {layer['layer']:5} {layer['hidden']:5} {cut['blocks']:7} {layer['first_block']:6}"
                f"  {_bytes(layer['registers_bytes']):>17}  {w_ih:<20}  {layer['step_us']:.3f}"
            )
    total = plan["predicted_us"]
    lines += ["", f"predicted   {total:.4g} µs, {plan['step_us']:.3g} µs a step; bound by {_words(plan['binds'])}"]
    for name, us in sorted(plan["terms"].items(), key=lambda term: -term[1]):
        if us >= 0.0005 * total:
            lines.append(f"  {_words(name):<18}{us:10.1f} µs {us / total:6.1%}")
    lines.append(f"no schedule takes less than {plan['limit_us']:.4g} µs (weights once from memory; all multiply-adds)")
    return "\n".join(lines)


def format_clusters(choices: dict[int, dict[str, Any]], planned: int) -> str:
    """The choices on chips that hold different numbers of clusters of 16 blocks: from number to what ``persistent_plan`` returned."""

    def where(plan: dict[str, Any]) -> str:
        if plan["why_not"]:
            return "cannot"
        ways = dict.fromkeys(
            f"clusters of {p['cut']['blocks']}"
            if p["cut"]["exchange"] == "cluster"
            else f"{_count(p['cut']['blocks'], 'block')}{' through L2' * (p['cut']['blocks'] > 1)}"
            for p in plan["passes"]
        )
        return f"{plan['predicted_us']:.4g} µs, {' and '.join(ways)}, {_count(len(plan['passes']), 'pass', 'es')}"

    training = any(choice["backward"]["passes"] or choice["backward"]["why_not"] for choice in choices.values())
    rows = [["clusters of 16", "forward", *["backward"] * training, "what would run"]]
    for number, choice in choices.items():
        plans = [choice["forward"], choice["backward"]][: 1 + training]
        runs = "the persistent kernel" if choice["persistent"] else "the diagonals"
        rows.append([f"{number}{' (planned for)' if number == planned else ''}", *map(where, plans), runs])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def format_timeline(plan: dict[str, Any], width: int = 96) -> str:
    """Which layer works when, in characters: a row for each layer, for the blocks of the first copy."""
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


def draw_timeline(choice: dict[str, Any], path: Path, title: str) -> None:
    """Draw the same picture with matplotlib: forward, and beside it backward where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plans = [plan for plan in (choice["forward"], choice["backward"]) if plan["passes"]]
    height = max(len(_rows(plan)) for plan in plans)
    figure, panels = plt.subplots(
        1, len(plans), figsize=(10 if len(plans) == 1 else 15, 1.6 + 0.25 * height), constrained_layout=True, squeeze=False
    )
    for axes, plan in zip(panels[0], plans, strict=True):
        rows = _rows(plan)
        for y, work in enumerate(rows.values()):
            spans = [(start, end - start) for _, start, end in work]
            colours = ["#c2410c" if chunk % 2 else "#fdba74" for chunk, _, _ in work]
            axes.broken_barh(spans, (y - 0.4, 0.8), facecolors=colours)
        passes = len(plan["passes"]) > 1
        axes.set_yticks(range(len(rows)), [f"layer {layer}" + (f" (pass {p})" if passes else "") for p, layer in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, plan["predicted_us"])
        axes.set_xlabel("µs, predicted; a change of shade is a change of chunk")
        axes.set_title("backward" if plan["backward"] else "forward", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\nas planned and predicted", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _rows(plan: dict[str, Any]) -> dict[tuple[int, int], list[tuple[int, float, float]]]:
    """(pass, layer) -> (chunk, start, end) of the work of the first copy's blocks: one batch group per round, direction 0."""
    rows: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for number, group, layer, direction, chunk, _, _, _, _, start, end in plan["timeline"]:
        if group % plan["passes"][number]["copies"] == 0 and direction == 0:
            rows.setdefault((number, layer), []).append((chunk, start, end))
    return dict(sorted(rows.items()))


def _layers(p: dict[str, Any]) -> str:
    first, last = p["first_layer"], p["last_layer"] - 1
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _words(name: str) -> str:
    return {"hand_over": "hand-over", "weights_from_l2": "weights from L2", "large_products": "large products"}.get(name, name)


def _format_diagonals(cost: dict[str, Any]) -> str:
    return f"{cost['predicted_us']:.4g} µs ({_count(cost['diagonals'], 'diagonal')}; bound by {cost['binds']})"


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
    parser.add_argument("--dtype", choices=FORMATS, default="bfloat16", help="float32: exact products; tf32: float32 by TF32")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--training", action="store_true", help="plan backward too, and a forward that keeps what it needs")
    parser.add_argument("--recompute", action="store_true", help="in training, keep less, and compute the gates again")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument(
        "--clusters-of-16",
        type=int,
        metavar="N",
        help="how many clusters of 16 blocks the chip holds at once (default: the fewest that were seen of this model); chips differ",
    )
    parser.add_argument("--costs", type=Path, metavar="FILE", help="a result file of `make gpu` on that device: plan with what it measured")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the timeline (needs matplotlib)")
    options = parser.parse_args(arguments)

    hidden: list[int] = options.hidden
    layers = options.layers or len(hidden)
    if len(hidden) not in (1, layers):
        parser.error(f"--hidden names {len(hidden)} sizes for {layers} layers: give one, or one a layer")
    hidden = hidden * layers if len(hidden) == 1 else hidden
    if options.png and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs matplotlib, which is not installed (pip install matplotlib)")
    device = DEVICES[options.device]
    if options.clusters_of_16 is not None:
        try:
            device = with_clusters_of_16(device, options.clusters_of_16)
        except ValueError as error:
            parser.error(f"--clusters-of-16: {error}")
    costs: dict[str, float] = {}
    if options.costs:
        try:
            costs, device = read_costs(options.costs, device)
        except ValueError as error:
            parser.error(str(error))

    training = options.training or options.recompute
    planned_for = functools.partial(
        persistent_plan,
        hidden_sizes=hidden,
        input_size=options.input,
        bidirectional=options.bidirectional,
        seq_len=options.steps,
        batch_size=options.batch,
        dtype=options.dtype,
        saving="recompute" if options.recompute else "full" if training else "none",
        costs=costs,
    )
    choice = planned_for(device)
    sizes = str(hidden[0]) if len(set(hidden)) == 1 else ",".join(map(str, hidden))
    title = (
        f"{_count(layers, 'layer')}, H {sizes}, B {options.batch}, T {options.steps}, {options.dtype}"
        f"{', bidirectional' * options.bidirectional}{', training' * training}{', gates again' * options.recompute}"
        f" on {device['full_name']}"
    )
    print(f"{title}, {device['sms']} SMs\n{NOTICE}")
    if options.costs:
        print(f"from {options.costs}: {', '.join(f'{name} {value:.4g}' for name, value in sorted(costs.items()))}")
    for name in ("forward", "backward")[: 1 + training]:
        plan = choice[name]
        print(f"\n{name.upper()}: {format_plan(plan)}")
        if plan["passes"]:
            print(f"\n{format_timeline(plan)}")
        print(f"\nby diagonals {_format_diagonals(choice[f'diagonal_{name}'])}")
    if device["short_gpcs"] or options.clusters_of_16 is not None:
        held = device["gpcs"] - device["short_gpcs"]
        numbers = sorted({*range(device["gpcs"], device["gpcs"] - 3, -1), held}, reverse=True)
        choices = {number: planned_for(with_clusters_of_16(device, number)) for number in numbers}
        print(f"\nchips of one model differ in how many clusters of 16 blocks they hold:\n{format_clusters(choices, held)}")
    print(f"\nwhat would run: {'the persistent kernel' if choice['persistent'] else 'the diagonals'}, as {choice['reason']}")
    if options.png and (choice["forward"]["passes"] or choice["backward"]["passes"]):
        draw_timeline(choice, options.png, title)
        print(f"\ndrawn: {options.png}")
    elif options.png:
        sys.exit(f"there is nothing to draw in {options.png}: {choice['reason']}")
