"""The planner of the persistent kernels: no plan over any limit, nothing left out, no wait for what nobody makes.

Nothing here needs a GPU: these are claims about plans (``csrc/persistent/plan.h``), forward and backward, for thousands of
stacks on the GPUs of ``csrc/cuda/device.h``.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys

import pytest

from stacked_lstm_ext import _C

DEVICES = {device["name"]: device for device in _C.persistent_devices()}
EIGHT = DEVICES["h100"] | {"short_gpcs": 0}  # an H100 that holds 8 clusters of 16 blocks, one a layer of the largest stacks
FORMATS = ((2, "tensor"), (4, "tensor"), (4, "exact"))  # bytes of an element, products
STACK_KEYS = ("device", "input_size", "hidden", "proj", "bidirectional", "steps", "batch", "bytes")
OPTIONS = ("product", "saving", "costs", "capacity")
INSTANCES = {
    (bytes_, backward): {
        (i["product"], i["exchange"], i["tiles"], i["pieces"], i["m_tiles"]): i for i in _C.persistent_instances(bytes_, backward)
    }
    for bytes_ in (2, 4)
    for backward in (False, True)
}


def arguments(stack):
    return [stack[key] for key in STACK_KEYS], {key: stack[key] for key in OPTIONS if key in stack}


def plan(stack, timeline=False):
    positional, named = arguments(stack)
    return _C.persistent_plan(*positional, **named, backward=stack["backward"], timeline=timeline)


def choice(stack):
    positional, named = arguments(stack)
    return _C.persistent_choice(*positional, **named)


def stack(device="h100", layers=1, hidden=512, **changes):
    hidden = hidden if isinstance(hidden, list) else [hidden] * layers
    default = {"proj": 0, "bidirectional": False, "steps": 64, "batch": 8, "bytes": 2, "product": "tensor", "saving": "none"}
    default["backward"] = changes.get("backward", False)
    default["saving"] = "full" if default["backward"] else "none"
    return default | {"device": device, "hidden": hidden, "input_size": hidden[0]} | changes


def random_stacks(count, seed):
    draw = random.Random(seed)
    widths = (1, 8, 40, 64, 96, 128, 200, 256, 384, 512, 650, 768, 1000, 1024, 1300)
    for _ in range(count):
        layers = draw.choice((1, 1, 2, 3, 4, 5, 8, 12, 30, 40))
        same = draw.random() < 0.6
        hidden = [draw.choice(widths)] * layers if same else [draw.choice(widths) for _ in range(layers)]
        bytes_, product = draw.choice(FORMATS)
        backward = draw.random() < 0.5
        yield stack(
            draw.choice(list(DEVICES)),
            hidden=hidden,
            input_size=draw.choice((1, 17, hidden[0], 64, 3000)),
            bidirectional=draw.random() < 0.2,
            steps=draw.choice((1, 2, 3, 17, 40, 512, 2000)),
            batch=draw.choice((1, 3, 8, 17, 32, 33, 100, 128, 1000)),
            bytes=bytes_,
            product=product,
            backward=backward,
            saving=draw.choice(("full", "recompute") if backward else ("none", "none", "full", "recompute")),
        )


STACKS = list(random_stacks(6000, seed=4))


@pytest.fixture(scope="module")
def plans():
    made = [(s, plan(s)) for s in STACKS]
    for backward in (False, True):
        planned = sum(not p["why_not"] for s, p in made if s["backward"] == backward)
        assert planned > 1500, f"too few of the stacks can be planned to test anything: {planned}, backward: {backward}"
    return [(s, p) for s, p in made if not p["why_not"]]


def clusters(device, size):
    """How many clusters of so many blocks its GPCs hold at once, an SM a block."""
    short = device["short_gpcs"]
    in_gpcs = (device["gpcs"] - short) * (device["sms_gpc"] // size) + short * (device["sms_short_gpc"] // size)
    return min(in_gpcs, device["sms"] // size)


def directions_of(stack):
    return 1 + stack["bidirectional"]


def inputs_of(stack):
    return [stack["input_size"]] + [directions_of(stack) * h for h in stack["hidden"][:-1]]


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------


def over_a_limit(stack, plan):
    """What a launch of this plan would ask of a device beyond what it has, from published limits alone."""
    device = DEVICES[stack["device"]]
    element = 64 // stack["bytes"]  # of a piece of K
    for p in plan["passes"]:
        cut, columns = p["cut"], 8 * p["cut"]["tiles"]
        units, hidden = 8 * cut["groups"], stack["hidden"][p["first_layer"]]
        allocated = math.ceil(p["registers_thread"] / 8) * 8 * p["threads"]
        yield "registers a thread", p["registers_thread"], 255
        yield "weights in registers", p["weight_registers"], p["registers_thread"] - 4 * cut["tiles"]
        yield "threads", p["threads"], 256
        yield "registers an SM", allocated, device["registers_sm"]
        yield "shared memory a block", p["shared_bytes"], device["shared_block"]
        yield "blocks, one an SM", p["blocks"], device["sms"]
        yield "blocks, all of them", p["lanes"] * p["copies"] * cut["blocks"], p["blocks"]
        yield "lanes of a launch", p["lanes"], 32
        yield "L2", p["l2_bytes"], device["l2_bytes"]
        yield "sequences of a group", max(last - first for first, last in p["sequences"]), columns
        yield "units", hidden, cut["blocks"] * units
        yield "blocks that own nothing", (cut["blocks"] - 1) * units + 1, hidden
        if cut["exchange"] == "cluster":
            yield "blocks without which a cluster has no peers", 2, cut["blocks"]
            yield "cluster", cut["blocks"], min(device["max_cluster"], 16)
            yield "clusters", p["lanes"] * p["copies"], clusters(device, cut["blocks"])
        if stack["backward"]:
            least = 2 * columns * 4 * units * stack["bytes"]  # two buffers of the gates' gradients
            if cut["exchange"] == "cluster":
                least += 2 * columns * cut["blocks"] * units * 4  # and of partial sums that come in
            if p["over"]:
                least += cut["chunk_steps"] * columns * hidden * 4
            yield "rows of all units", cut["blocks"] * units, 128 * cut["m_tiles"]
            yield "K of the gates", 32 * cut["groups"], cut["pieces"] * element
            yield "a warp's share of K", cut["pieces"] * element, 32 * cut["groups"]
            yield "W_hh in registers", 4 * hidden * hidden, p["weight_registers"] * (4 // stack["bytes"]) * 256 * cut["blocks"]
        else:
            least = 2 * columns * hidden * stack["bytes"]  # two buffers of h
            depth = cut["pieces"] * cut["splits"] * element
            yield "recurrent rows", max(hidden, cut["blocks"] * units), depth
            yield "warps", cut["groups"] * cut["splits"], 8
            yield "W_hh in registers", 4 * hidden * hidden, p["weight_registers"] * (4 // stack["bytes"]) * p["threads"] * cut["blocks"]
            if cut["inputs_in_shared"]:
                least += 4 * units * max(layer["inputs"] for layer in p["layers"]) * stack["bytes"]
        yield "what has to be in shared memory", least, p["shared_bytes"]


def test_no_plan_is_over_any_limit(plans):
    for s, p in plans:
        for what, asked, there in over_a_limit(s, p):
            assert asked <= there, f"{what}: {asked} of {there}, for {s}"


def test_every_cut_is_one_that_a_compiled_kernel_runs(plans):
    used = set()
    for s, p in plans:
        instances = INSTANCES[s["bytes"], s["backward"]]
        for each in p["passes"]:
            cut = each["cut"]
            key = tuple(cut[name] for name in ("product", "exchange", "tiles", "pieces", "m_tiles"))
            assert key in instances and cut["product"] == s["product"], f"{cut} for {s}"
            assert each["weight_registers"] == instances[key]["weight_registers"]
            used.add((s["bytes"], s["backward"], key))
    assert len(used) > sum(map(len, INSTANCES.values())) / 2, "a sweep that sees so few of the instances shows little"


def test_every_layer_is_in_one_pass_and_every_unit_has_one_owner(plans):
    for s, p in plans:
        layers = [layer["layer"] for each in p["passes"] for layer in each["layers"]]
        assert layers == list(range(len(s["hidden"]))), s
        for each in p["passes"]:
            assert [layer["layer"] for layer in each["layers"]] == list(range(each["first_layer"], each["last_layer"]))
            widths = {s["hidden"][layer["layer"]] for layer in each["layers"]}
            assert widths == {each["layers"][0]["hidden"]}, "a launch has one width"
            owned = [unit for first, last in each["units"] for unit in range(first, last)]
            assert owned == list(range(max(widths))), s
            assert all(0 < last - first <= 8 * each["cut"]["groups"] for first, last in each["units"]), s
            assert len(each["units"]) == each["cut"]["blocks"]


def test_every_sequence_is_in_one_batch_group_and_every_group_in_one_round(plans):
    for s, p in plans:
        for each in p["passes"]:
            assert [b for first, last in each["sequences"] for b in range(first, last)] == list(range(s["batch"]))
            assert len(each["sequences"]) == each["batch_groups"] and all(last > first for first, last in each["sequences"])
            assert 1 <= each["copies"] <= each["batch_groups"]
            assert each["rounds"] == math.ceil(each["batch_groups"] / each["copies"])


def test_only_backward_runs_in_segments_of_whole_chunks_and_for_a_reason(plans):
    """Gates that are computed again have to have room in memory, or weight gradients are made beside the recurrence."""
    for s, p in plans:
        for each in p["passes"]:
            steps = each["segment_steps"]
            assert each["segments"] == math.ceil(s["steps"] / steps) and 1 <= steps <= s["steps"]
            assert steps == s["steps"] or steps % each["cut"]["chunk_steps"] == 0
            recompute = s["backward"] and s["saving"] == "recompute"
            assert steps == s["steps"] or recompute or each["products_beside"]
            a_step = s["batch"] * each["lanes"] * 4 * each["layers"][0]["hidden"] * 4
            assert not recompute or steps * a_step <= 256 << 20 or steps == 1, s


def gradient_work(s, first, last):
    """Multiply-adds of the weight gradients of layers first … last - 1, over all rows."""
    weights = sum(4 * h * (i + h) for i, h in list(zip(inputs_of(s), s["hidden"], strict=True))[first:last])
    return weights * directions_of(s) * s["batch"] * s["steps"]


def test_weight_gradients_are_made_beside_the_recurrence_only_where_sms_are_idle_and_much_is_saved(plans):
    """What is left to do after all launches cannot be less than what the idle SMs have had no time for."""
    costs, beside = _C.persistent_costs(), [(s, p) for s, p in plans if any(each["products_beside"] for each in p["passes"])]
    assert len(beside) > 100
    for s, p in beside:
        assert s["backward"]
        after = plan(s | AFTER_ALL)
        assert not any(each["products_beside"] for each in after["passes"])
        cuts, cuts_after = ([[each["cut"], each["first_layer"], each["blocks"]] for each in made["passes"]] for made in (p, after))
        if cuts == cuts_after:
            assert p["predicted_us"] < 0.97 * after["predicted_us"], s
        else:  # all of them by one exchange, which leaves more SMs idle
            assert p["predicted_us"] < after["predicted_us"] and len({cut["exchange"] for cut, _, _ in cuts}) == 1, s

        device = DEVICES[s["device"]]
        rate = device["fma_rate"] if s["product"] == "exact" else device["mma_rate"] / (s["bytes"] / 2)
        share = costs["fma_share"] if s["product"] == "exact" else costs["product_share"]
        per_us = rate * share * device["sms"] * device["clock_mhz"]
        left = gradient_work(s, 0, len(s["hidden"])) / per_us
        for number, each in enumerate(p["passes"]):
            assert each["products_beside"] == (number > 0 or each["segments"] > 1), "something has to come after them"
            launched = sum(each["terms"].values()) - each["terms"]["large_products"]
            left -= launched * (1 - each["blocks"] / device["sms"]) * costs["beside_share"]
        assert p["after_us"] >= left * (1 - 1e-9), s


@pytest.mark.parametrize("device, layers, hidden", [("a100", 4, 512), ("h100", 1, 768)])
def test_weight_gradients_are_made_beside_the_recurrence_of_a_large_batch(device, layers, hidden):
    (only,) = plan(stack(device, layers, hidden, steps=1024, batch=16, backward=True))["passes"]
    assert only["products_beside"] and only["segments"] > 1
    (alone,) = plan(stack(device, layers, hidden, steps=1024, batch=1, backward=True))["passes"]
    assert not alone["products_beside"] and alone["segments"] == 1


def test_a_bidirectional_layer_is_a_pass_of_its_own(plans):
    for s, p in plans:
        assert not s["bidirectional"] or all(len(each["layers"]) == 1 for each in p["passes"])


def test_only_backward_of_several_layers_has_a_layer_over_another(plans):
    for s, p in plans:
        assert all(each["over"] == (s["backward"] and len(each["layers"]) > 1) for each in p["passes"])


# --------------------------------------------------------------------------------------------------------------------
# Who waits for whom
# --------------------------------------------------------------------------------------------------------------------

SHORT = [s for s in STACKS if s["steps"] <= 40 and s["batch"] <= 128 and len(s["hidden"]) <= 12][:800]
SHORT += [  # several segments, in rounds, and in passes
    stack("h100", 3, 256, steps=40, batch=2000, backward=True, saving="recompute"),
    stack("h200", 6, 512, steps=37, batch=1500, backward=True, saving="recompute"),
]


@pytest.fixture(scope="module")
def timelines():
    made = [(s, plan(s, timeline=True)) for s in SHORT]
    assert all(max(each["segments"] for each in p["passes"]) > 1 for _, p in made[-2:])
    return [(s, p) for s, p in made if not p["why_not"]]


def test_every_chunk_is_worked_on_once_by_the_blocks_that_own_its_lane(timelines):
    for s, p in timelines:
        expected, got = set(), [work[1:5] for work in p["timeline"]]
        for each in p["passes"]:
            layers, directions = range(each["first_layer"], each["last_layer"]), range(directions_of(s))
            chunks = range(math.ceil(s["steps"] / each["cut"]["chunk_steps"]))
            expected |= set(itertools.product(range(each["batch_groups"]), layers, directions, chunks))
        assert len(got) == len(set(got)) and set(got) == expected, s
        for number, group, layer, direction, _, first, blocks, *_ in p["timeline"]:
            each = p["passes"][number]
            assert each["first_layer"] <= layer < each["last_layer"]
            assert blocks == each["cut"]["blocks"]
            # The numbering of persistent/kernels.h.
            lane = (layer - each["first_layer"]) * directions_of(s) + direction
            assert first == (group % each["copies"] * each["lanes"] + lane) * blocks
            assert first + blocks <= each["blocks"] <= DEVICES[s["device"]]["sms"]


def test_no_block_works_for_two_lanes_at_once(timelines):
    for s, p in timelines:
        busy = {}
        for number, _, _, _, _, first, blocks, _, _, start, end in p["timeline"]:
            for block in range(first, first + blocks):
                busy.setdefault((number, block), []).append((start, end))
        for spans in busy.values():
            spans.sort()
            assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(spans)), s


def test_a_chunk_waits_for_what_its_layer_reads(timelines):
    for s, p in timelines:
        beside = 1 if s["backward"] else -1
        for number, _, layer, _, chunk, _, _, needs_layer, needs_chunks, _, _ in p["timeline"]:
            if not 0 <= layer + beside < len(s["hidden"]):
                assert needs_layer == -1
                continue
            assert needs_layer == layer + beside
            here = p["passes"][number]
            there = next(each for each in p["passes"] if each["first_layer"] <= needs_layer < each["last_layer"])
            done = min(needs_chunks * there["cut"]["chunk_steps"], s["steps"])
            last = s["steps"] if there is not here else min((chunk + 1) * here["cut"]["chunk_steps"], s["steps"])
            assert done >= last, f"layer {layer} chunk {chunk} reads {last} steps and waits for {done}, for {s}"


def test_nobody_waits_for_ever(timelines):
    """Each lane's blocks take their chunks in order, passes one after another; whatever moves, all comes to the end."""
    for s, p in timelines:
        done = {}  # chunks of a lane of a batch group; of a pass before this one, whose groups may differ: of all groups
        numbers = range(len(p["passes"]))
        for number in reversed(numbers) if s["backward"] else numbers:
            queues = {}
            for work in p["timeline"]:
                if work[0] == number:
                    queues.setdefault(work[5], []).append(work)
            here, finished = range(p["passes"][number]["first_layer"], p["passes"][number]["last_layer"]), {}
            for (_, layer, direction), chunks in done.items():
                finished[layer, direction] = min(chunks, finished.get((layer, direction), chunks))
            while queues:
                moved = False
                for place, queue in sorted(queues.items(), reverse=not s["backward"]):  # those first that wait
                    _, group, layer, direction, chunk, _, _, needs_layer, needs_chunks, _, _ = queue[0]
                    ready = all(
                        (done.get((group, needs_layer, d), 0) if needs_layer in here else finished.get((needs_layer, d), 0)) >= needs_chunks
                        for d in range(directions_of(s) if needs_layer >= 0 else 0)
                    )
                    if ready:
                        assert done.get((group, layer, direction), 0) == chunk, "the chunks of a lane come in order"
                        done[group, layer, direction] = chunk + 1
                        queue.pop(0)
                        moved = True
                        if not queue:
                            del queues[place]
                assert moved, f"deadlock of {[queue[0][:5] for queue in queues.values()]} for {s}"


def test_the_timeline_keeps_its_waits_and_ends_when_predicted(timelines):
    for s, p in timelines:
        ends, passes_end = {}, {}
        for number, group, layer, direction, chunk, _, _, needs_layer, needs_chunks, start, end in p["timeline"]:
            assert end > start
            each = p["passes"][number]
            if each["first_layer"] <= needs_layer < each["last_layer"]:
                ready = max(ends[group, needs_layer, d, needs_chunks - 1] for d in range(directions_of(s)))
                assert start >= ready, f"layer {layer} chunk {chunk} starts before what it reads is there, for {s}"
            elif needs_layer >= 0:
                before = number + 1 if s["backward"] else number - 1
                assert start >= passes_end[before] - 1e-6
            if chunk:
                assert start >= ends[group, layer, direction, chunk - 1]
            ends[group, layer, direction, chunk] = end
            passes_end[number] = max(end, passes_end.get(number, 0))
        assert max(ends.values()) + p["after_us"] == pytest.approx(p["predicted_us"], rel=1e-9), s


# --------------------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------------------


def physical_limit(s):
    """Weights once from memory, and all multiply-adds at the published rates; backward: of dL/dh alone."""
    device, directions = DEVICES[s["device"]], directions_of(s)
    inputs = inputs_of(s)
    if s["backward"]:
        inputs[0] = 0
    weights = sum(4 * h * (i + h) * directions for i, h in zip(inputs, s["hidden"], strict=True))
    rate = device["fma_rate"] if s["product"] == "exact" else device["mma_rate"] / (s["bytes"] / 2)
    per_us = device["sms"] * rate * device["clock_mhz"]
    return max(weights * s["bytes"] / device["memory_gb_s"] / 1e3, weights * s["batch"] * s["steps"] / per_us)


def test_no_prediction_is_below_the_physical_limit(plans):
    for s, p in plans:
        assert p["limit_us"] == pytest.approx(physical_limit(s))
        assert p["predicted_us"] >= p["limit_us"], s


def test_no_prediction_of_the_diagonals_is_below_the_physical_limit():
    for s in STACKS[:1500]:
        chosen = choice(s)
        cost = chosen["diagonal_backward" if s["backward"] else "diagonal_forward"]
        assert cost["predicted_us"] >= physical_limit(s), s
        assert cost["predicted_us"] >= max(cost["host_us"], cost["device_us"]) and cost["diagonals"] >= s["steps"]


def test_the_terms_of_a_prediction_add_up(plans):
    for s, p in plans:
        assert all(us >= 0 for us in p["terms"].values()), s
        assert sum(p["terms"].values()) == pytest.approx(p["predicted_us"])
        assert p["terms"][p["binds"]] == max(p["terms"].values())
        assert sum(sum(each["terms"].values()) for each in p["passes"]) + p["after_us"] == pytest.approx(p["predicted_us"])
        for each in p["passes"]:
            terms = each["terms"]
            whole = terms["launch"] + terms["load"] + each["ahead_us"] + each["rounds"] * each["makespan_us"]
            assert sum(terms.values()) == pytest.approx(whole), s


AFTER_ALL = {"costs": {"beside_share": 1e-9}}  # large products take the whole device


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"hidden": s["hidden"] + [s["hidden"][-1]]},
        lambda s: s | {"hidden": s["hidden"] + [200]},
        lambda s: s | {"steps": s["steps"] + 1},
        lambda s: s | {"steps": 2 * s["steps"]},
        lambda s: s | {"batch": s["batch"] + 1},
        lambda s: s | {"batch": s["batch"] + 100},
        lambda s: s | {"saving": "recompute" if s["backward"] else "full"},
        lambda s: s | {"input_size": s["input_size"] + 100},
    ],
    ids=["deeper", "deeper, 200 units", "a step longer", "twice as long", "a sequence more", "more sequences", "saving", "wider input"],
)
def test_more_work_is_never_cheaper(plans, change):
    """But for products beside the recurrence: passes are chosen for themselves, not for the room that they leave."""
    for s, p in plans[:600]:
        if any(each["products_beside"] for each in p["passes"]):
            p = plan(s | AFTER_ALL)
        more = plan(change(s) | AFTER_ALL)
        assert more["why_not"] or more["predicted_us"] >= p["predicted_us"] * (1 - 1e-9), (s, change(s))


@pytest.mark.parametrize("backward", [False, True])
def test_a_better_device_is_never_slower(backward):
    better = [("sms", 2, int), ("memory_gb_s", 1.5, float), ("l2_bytes", 2, int), ("mma_rate", 2, float), ("clock_mhz", 1.2, float)]
    for s in [s for s in STACKS if s["backward"] == backward and not plan(s)["why_not"]][:150]:
        device = DEVICES[s["device"]]
        for name, times, kind in better:
            # With twice the SMs come twice the GPCs: clusters lie inside one.
            changed = {name: kind(device[name] * times)} | ({"gpcs": 2 * device["gpcs"]} if name == "sms" else {})
            faster = plan(s | {"device": device | changed} | AFTER_ALL)
            assert faster["predicted_us"] <= plan(s | AFTER_ALL)["predicted_us"] * (1 + 1e-9), (name, s)


def test_depth_is_nearly_free_where_the_layers_fit():
    one, sixteen = (plan(stack(EIGHT, layers, 256, steps=512))["predicted_us"] for layers in (1, 16))
    assert sixteen <= 1.5 * one


@pytest.mark.parametrize("hidden, low, high", [(512, 0.58, 0.93), (256, 0.47, 0.67)])
def test_a_step_without_the_projection_is_predicted_within_the_range_of_the_prototype(hidden, low, high):
    steps = 512
    (only,) = plan(stack(EIGHT, 8, hidden, steps=steps))["passes"]
    terms = only["terms"]
    assert only["cut"]["exchange"] == "cluster"
    assert low <= (terms["exchange"] + terms["products"] + terms["gates"]) / steps <= high


# --------------------------------------------------------------------------------------------------------------------
# Which schedule
# --------------------------------------------------------------------------------------------------------------------


def test_the_cheaper_schedule_is_chosen_and_the_reason_names_both():
    chosen = set()
    for s in STACKS[:1500]:
        c = choice(s)
        chosen.add(c["persistent"])
        training = s["saving"] != "none"
        assert c["diagonal_us"] == pytest.approx(c["diagonal_forward"]["predicted_us"] + c["diagonal_backward"]["predicted_us"] * training)
        why_not = c["forward"]["why_not"] or c["backward"]["why_not"]
        if why_not:
            assert not c["persistent"] and why_not in c["reason"]
            continue
        assert c["persistent_us"] == pytest.approx(c["forward"]["predicted_us"] + c["backward"]["predicted_us"])
        assert c["persistent"] == (c["persistent_us"] <= c["diagonal_us"])
        assert str(round(c["persistent_us"])) in c["reason"] and str(round(c["diagonal_us"])) in c["reason"]
        assert bool(c["backward"]["passes"]) == training
    assert chosen == {True, False}


@pytest.mark.parametrize(
    "what",
    [
        stack("h100", 1, 4096),
        stack("l4", 2, 1024),
        stack("h100", 2, 64, proj=20),
        stack("h100", 1, 64, bytes=8),
        stack("h100", 2, 1500, saving="full"),
    ],
    ids=["too wide", "too few SMs", "projection", "float64", "backward alone too wide"],
)
def test_what_the_persistent_kernel_cannot_run_goes_to_the_diagonals(what):
    c = choice(what)
    assert not c["persistent"] and c["diagonal_us"] > 0 and c["persistent_us"] == 0
    assert c["reason"].startswith("the persistent kernel cannot run it: ")


def test_a_stack_far_larger_than_the_chip_goes_to_whichever_is_faster():
    small_steps, large_batch = (choice(stack("h100", 8, 1024, steps=512, batch=batch)) for batch in (8, 4096))
    assert small_steps["persistent"] and len(small_steps["forward"]["passes"]) > 1
    assert not large_batch["persistent"] and large_batch["forward"]["passes"][0]["rounds"] > 1


# --------------------------------------------------------------------------------------------------------------------
# Devices: as CUDA's driver describes them, and as it takes back what they promise
# --------------------------------------------------------------------------------------------------------------------

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "sms": 132,
    "registers_sm": 65536,
    "shared_block": 232448,
    "shared_sm": 233472,
    "l2_bytes": 50 << 20,
    "clock_khz": 1980000,
    "memory_clock_khz": 2619000,
    "memory_bus_bits": 5120,
}


def test_a_driver_describes_the_h100_as_we_do():
    device = _C.persistent_device_from(H100)
    assert device["name"] == "h100" and device["full_name"] == H100["name"]
    assert device["clock_mhz"] == 1980 and device["memory_gb_s"] == pytest.approx(3352, abs=1)
    same = ("capability", "sms", "registers_sm", "shared_block", "shared_sm", "l2_bytes", "max_cluster", "mma_rate", "fma_rate")
    assert {key: device[key] for key in same} == {key: DEVICES["h100"][key] for key in same}


@pytest.mark.parametrize(
    "told, expected",
    [
        (H100 | {"name": "NVIDIA H100 PCIe", "sms": 114}, {"name": "h100", "sms": 114, "max_cluster": 16}),
        (H100 | {"name": "NVIDIA GH100X"}, {"name": "sm_90", "max_cluster": 8, "mma_rate": 2048}),
        (H100 | {"max_cluster": 4}, {"name": "h100", "max_cluster": 4}),
        ({"name": "NVIDIA L40S", "major": 8, "minor": 9, "sms": 142}, {"name": "sm_89", "sms": 142, "max_cluster": 1}),
        ({"name": "NVIDIA L4", "major": 8, "minor": 9}, {"name": "l4", "sms": 58, "memory_gb_s": 300}),
        ({"name": "NVIDIA GeForce RTX 4090", "major": 8, "minor": 9}, {"name": "rtx4090", "mma_rate": 256}),
        ({"name": "NVIDIA A100-SXM4-40GB", "major": 8, "minor": 0, "l2_bytes": 40 << 20}, {"name": "a100", "max_cluster": 1}),
        ({"name": "NVIDIA RTX PRO", "major": 12, "minor": 0}, {"name": "sm_120", "max_cluster": 8, "capability": (12, 0)}),
        ({"name": "Tesla V100", "major": 7, "minor": 0}, {"name": "sm_70", "capability": (7, 0)}),
    ],
    ids=lambda value: value["name"],
)
def test_any_gpu_is_a_device(told, expected):
    device = _C.persistent_device_from(told)
    assert {key: device[key] for key in expected} == expected
    assert all(device[key] > 0 for key in device if key not in ("name", "full_name", "capability", "short_gpcs", "sms_short_gpc"))
    # Which SMs make up a GPC is not known. What is promised is an upper bound: see the next test but one.
    assert all(clusters(device, size) == device["sms"] // size for size in range(2, 17))
    why_not = plan(stack(device, 2, 64))["why_not"]
    assert ("below 8.0" in why_not) == (told["major"] < 8)


def test_what_the_driver_takes_back_is_planned_anew():
    asked = []

    def capacity(backward, cut, most_inputs, hidden, over):
        asked.append((backward, cut, most_inputs, hidden, over))
        return 0 if cut["exchange"] == "cluster" and cut["blocks"] == 16 else 96

    free, held = (plan(stack(EIGHT, 8, 512, input_size=40, **extra)) for extra in ({}, {"capacity": capacity}))
    assert {p["cut"]["blocks"] for p in free["passes"]} == {16} and len(free["passes"]) == 1
    assert held["passes"] and not any(p["cut"]["exchange"] == "cluster" and p["cut"]["blocks"] == 16 for p in held["passes"])
    assert all(p["blocks"] <= 96 for p in held["passes"])
    assert held["predicted_us"] >= free["predicted_us"]
    assert {(backward, inputs, hidden, over) for backward, _, inputs, hidden, over in asked} == {(False, 512, 512, False)}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("blocks", [100, 48, 12, 6, 4])
def test_a_plan_fits_whatever_the_driver_holds(blocks, backward):
    p = plan(stack("h100", 4, 96, batch=40, backward=backward, capacity=lambda *_: blocks))
    assert p["passes"] and all(each["blocks"] <= blocks for each in p["passes"])


CHIPS = {  # H100s by how many of their GPCs have 16 SMs or more: the other GPCs have so many that the chip has 132
    held: EIGHT | {"short_gpcs": 8 - held, "sms_short_gpc": short} for held, short in ((8, 16), (7, 14), (6, 12))
}


def holds(device, exchanges=("cluster", "l2")):
    """What CUDA's driver says of such a chip: of these exchanges; of the other one that it holds a single block."""

    def capacity(backward, cut, *_):
        if cut["exchange"] not in exchanges:
            return 1
        return clusters(device, cut["blocks"]) * cut["blocks"] if cut["exchange"] == "cluster" else device["sms"]

    return capacity


CROWDED = (
    [  # stacks that want most of the SMs, in clusters
        stack("h100", layers, hidden, steps=512, batch=batch, backward=backward)
        for layers, hidden, batch in ((8, 512, 8), (8, 512, 32), (7, 512, 8), (12, 512, 8), (8, 384, 8), (16, 256, 8), (1, 512, 200))
        for backward in (False, True)
    ]
    + [s for s in STACKS if s["device"] in ("h100", "h200")][:150]
)


@pytest.mark.parametrize("held", CHIPS)
def test_with_a_driver_the_cheapest_plan_for_the_chip_is_found(held):
    """It is asked about few cuts; what it says leads to the plan that its whole chip, if it were described, would get.

    (But for products beside the recurrence: passes are chosen for themselves, not for the room that they leave.)
    """
    described = _C.persistent_device_from(H100)
    for s in CROWDED[:14] + [s | AFTER_ALL for s in CROWDED]:
        same = {"device": CHIPS[held] | {key: described[key] for key in ("clock_mhz", "memory_gb_s")}}
        asked, expected = (plan(s | extra) for extra in ({"device": described, "capacity": holds(CHIPS[held])}, same))
        assert bool(asked["why_not"]) == bool(expected["why_not"]), s
        assert asked["predicted_us"] == expected["predicted_us"], s


@pytest.mark.parametrize("held", CHIPS)
def test_on_every_chip_clusters_are_kept_where_they_are_cheaper_and_never_asked_for_where_they_do_not_fit(held):
    kept = set()
    for s in CROWDED[:14]:
        s = s | {"device": CHIPS[held]}
        p = plan(s)
        for each in p["passes"]:
            cut = each["cut"]
            assert each["blocks"] <= holds(CHIPS[held])(False, cut), s
        by = {exchange: plan(s | {"capacity": holds(CHIPS[held], [exchange])}) for exchange in ("cluster", "l2")}
        us = {exchange: made["predicted_us"] for exchange, made in by.items() if not made["why_not"]}
        assert us and p["predicted_us"] <= min(us.values()), s
        exchanges = {each["cut"]["exchange"] for each in p["passes"]}
        if exchanges == {"l2"}:
            assert p["predicted_us"] == us["l2"] <= us.get("cluster", math.inf), s
        kept |= exchanges
    assert "cluster" in kept


def test_the_eighth_layer_of_512_units_takes_a_chip_with_eight_clusters_of_16():
    """Without: two passes in clusters are predicted to take longer than one through L2, whose blocks may lie anywhere."""
    for layers, held, backward in itertools.product((6, 7, 8), CHIPS, (False, True)):
        (only,) = plan(stack(CHIPS[held], layers, 512, steps=512, backward=backward))["passes"]
        assert only["cut"]["blocks"] == 16
        assert only["cut"]["exchange"] == ("cluster" if layers <= held else "l2"), (layers, held, backward)


def test_a_device_that_is_not_here_is_taken_to_hold_the_fewest_clusters_that_were_seen():
    for name in ("h100", "h200"):
        assert [clusters(DEVICES[name], size) for size in (8, 16)] == [15, 7]
        fewest, most = (plan(stack(device, 8, 512)) for device in (name, DEVICES[name] | {"short_gpcs": 0}))
        assert fewest["predicted_us"] > most["predicted_us"]


@pytest.mark.parametrize("backward", [False, True])
def test_a_driver_that_holds_nothing_is_a_reason_and_no_endless_search(backward):
    p = plan(stack("h100", 8, 512, backward=backward, capacity=lambda *_: 0))
    assert p["passes"] == [] and any(c.isdigit() for c in p["why_not"])


# --------------------------------------------------------------------------------------------------------------------
# What is planned, and what is refused
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_layers_of_different_widths_are_passes_of_their_own(backward):
    p = plan(stack("h100", hidden=[256, 96, 96, 96, 128], input_size=30, backward=backward))
    assert [(each["first_layer"], each["last_layer"]) for each in p["passes"]] == [(0, 1), (1, 4), (4, 5)]
    assert all(each["cut"]["exchange"] == "cluster" for each in p["passes"])


@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_is_that_of_its_own_layers_alone(backward):
    """Also where the layers of two passes are equally wide, and only what the lowest of them reads differs."""
    passes = plan(stack("h100", hidden=[256, 256, 96, 256, 256], backward=backward))["passes"]
    for part, input_size in zip(passes, (256, 256, 96), strict=True):
        hidden = [layer["hidden"] for layer in part["layers"]]
        (alone,) = plan(stack("h100", hidden=hidden, input_size=input_size, backward=backward))["passes"]
        assert [layer["inputs"] for layer in part["layers"]] == [input_size, *hidden[:-1]]
        same = ("cut", "blocks", "shared_bytes", "makespan_us", "step_us")
        assert {key: part[key] for key in same} == {key: alone[key] for key in same}
        assert [layer["w_ih_bytes"] for layer in part["layers"]] == [layer["w_ih_bytes"] for layer in alone["layers"]]


def test_states_cost_what_it_takes_to_write_and_read_them():
    """Forward writes c as for a backward pass; backward also reads a gradient of c."""
    for case in (stack(layers=4), stack(layers=1, hidden=1024, batch=128), stack("a100", 2, 300, bytes=4)):
        (saves, states), kept = (
            [_C.persistent_plan(*arguments(case)[0], saving=saving, states=given)["terms"]["saves"] for given in (False, True)]
            for saving in ("none", "recompute")
        )
        assert saves == 0 and states > 0 and kept == [states] * 2
    slow = stack(DEVICES["h100"] | {"memory_gb_s": 100}, 4, 512, batch=32)
    plans = [_C.persistent_plan(*arguments(slow)[0], saving="full", backward=True, states=given) for given in (False, True)]
    assert plans[0]["predicted_us"] < plans[1]["predicted_us"]


@pytest.mark.parametrize("backward", [False, True])
def test_what_does_not_fit_at_once_is_split_into_passes(backward):
    p = plan(stack(EIGHT, 24, 512, backward=backward))
    assert [(each["first_layer"], each["last_layer"]) for each in p["passes"]] == [(0, 8), (8, 16), (16, 24)]


def test_a_launch_takes_32_lanes():
    p = plan(stack("b200", 40, 8, steps=512))
    assert len(p["passes"]) == 2 and max(each["lanes"] for each in p["passes"]) <= 32


def test_a_large_batch_runs_in_groups_side_by_side_and_in_rounds():
    for p in plan(stack("h100", 2, 256, batch=5000))["passes"]:
        assert p["copies"] > 1 and p["rounds"] > 1


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", sorted(DEVICES))
def test_clusters_are_for_devices_that_have_them(device, backward):
    exchange = {each["cut"]["exchange"] for each in plan(stack(device, 4, 256, backward=backward))["passes"]}
    assert exchange == ({"cluster"} if DEVICES[device]["capability"] >= (9, 0) else {"l2"})


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bytes_, product", FORMATS)
@pytest.mark.parametrize("hidden", [1, 8, 9, 16, 17, 32, 33])
def test_a_layer_that_one_block_holds_is_no_cluster(hidden, bytes_, product, backward):
    """st.async is undefined in a cluster of one block. And a block needs none: its h, or sums of dh, are kept where they are."""
    for device in ("h100", "a100"):
        (only,) = plan(stack(device, 3, hidden, bytes=bytes_, product=product, backward=backward))["passes"]
        cut, blocks, exchange = only["cut"], only["cut"]["blocks"], only["terms"]["exchange"]
        assert cut["exchange"] == ("cluster" if blocks > 1 and device == "h100" else "l2")
        inside = cut["m_tiles"] == 1 or (not backward and cut["pieces"] * 64 // bytes_ <= 64)
        assert blocks > 1 or inside, "such a cut pays for words that nobody needs"
        assert blocks == 1 or hidden > (8 if not backward else 32 if bytes_ == 2 else 16)
        # Of a step: a barrier and a look at shared memory, or else more than a crossing takes at least.
        assert (exchange / 64 < 0.1) == (blocks == 1) and (exchange / 64 > 0.2) == (blocks > 1)


@pytest.mark.parametrize("backward", [False, True])
def test_a_layer_wider_than_a_cluster_goes_through_l2(backward):
    assert {each["cut"]["exchange"] for each in plan(stack("h100", 2, 1024, backward=backward))["passes"]} == {"l2"}


REFUSED = [  # what, and what its refusal names
    (stack("l4", 2, 1024), ["1024", "forward", "blocks", "58 SMs"]),
    (stack("l4", 2, 1024, backward=True), ["1024", "backward", "64 blocks", "58 SMs"]),
    (stack("h100", hidden=[64, 2000]), ["layer 1", "2000", "132 SMs"]),
    (stack("h100", 1, 4096), ["layer 0", "4096", "2048"]),
    (stack("h100", 1, 1100, backward=True), ["layer 0", "1100", "1024"]),
    (stack("a100", 1, 1024, bytes=4), ["1024", "4 bytes", "128 blocks", "108 SMs"]),
    (stack("h100", 1, 64, bytes=8), ["float32", "float64"]),
    (stack("h100", 1, 64, bytes=1), ["1 bytes", "2 or 4"]),
    (stack("h100", 1, 64, product="exact"), ["2 bytes", "exact", "forward"]),
    (stack("h100", 2, 64, proj=20), ["layer 0", "20"]),
    (stack("h100", 2, 64, steps=0), ["2 layers", "0 steps"]),
    (stack("h100", 2, 64, batch=0), ["batch 0"]),
    (stack("h100", 2, 64, batch=1 << 20), ["1048576", "65536"]),
    (stack("h100", 2, 64, input_size=1 << 23), ["layer 0", "8388608", "1048576"]),
    (stack("h100", 1, 1000, bidirectional=True, bytes=4), ["1000", "SMs"]),
    (stack(DEVICES["h100"] | {"shared_block": 20000}, 1, 512), ["512", "bytes of shared memory", "20000"]),
    (stack(DEVICES["h100"] | {"registers_sm": 8192}, 1, 512), ["512", "132 SMs", "at once"]),
]


@pytest.mark.parametrize("refused, numbers", REFUSED, ids=[str(numbers) for _, numbers in REFUSED])
def test_a_refusal_is_a_sentence_with_numbers(refused, numbers):
    p = plan(refused, timeline=True)
    assert p["passes"] == [] and p["timeline"] == []
    for number in numbers:
        assert number in p["why_not"], p["why_not"]


def test_every_refusal_of_the_sweep_names_numbers():
    refusals = {plan(s)["why_not"] for s in STACKS[:2000]} - {""}
    assert refusals and all(any(c.isdigit() for c in why) for why in refusals)
    assert not any(why.startswith("no partition") for why in refusals), "a reason is missing from obstacle()"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"device": "v100"}, "a100.*got: v100"),
        ({"hidden": [8, 0]}, "hidden.*got: 0"),
        ({"input_size": 0}, "got: 0"),
        ({"product": "tf32"}, "tensor, exact, got: tf32"),
        ({"saving": "some"}, "none, full, recompute, got: some"),
        ({"costs": {"cluster_ms": 1.0}}, "no cost of the name cluster_ms"),
        ({"costs": {"cluster_us": 0.0}}, "cluster_us should be a number above 0"),
    ],
)
def test_what_is_no_stack_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(stack() | wrong)


# --------------------------------------------------------------------------------------------------------------------
# Costs that `make gpu` has measured
# --------------------------------------------------------------------------------------------------------------------


def figure(median, unit, **more):
    return {"unit": unit, "median": median, "min": median, "max": median, "wrong": 0} | more


def result_file(path, **changes):
    """Made up, in the form of benchmarks/gpu/primitives.py: an exchange of 300 ns and 20 bytes a nanosecond."""
    figures = {
        "tagged word through L2, one way": figure(400, "ns"),
        "2 KiB and a flag through L2, block to block": figure(900, "ns"),
        "barrier of the grid": figure(1500, "ns"),
        "barrier of 256 threads": figure(20, "cycles"),
        "reads from shared memory": figure(120, "bytes/cycle"),
        "reads from L2, all multiprocessors, 8 MiB": figure(132 * 1.83 * 25, "GB/s"),
        "latency of L2": figure(280, "cycles"),
        "latency of mma m16n8k16 bf16": figure(32, "cycles"),
        "mma m16n8k16 bf16, one multiprocessor": figure(0.7, "mma/cycle"),
        "an empty kernel in a stream": figure(2200, "ns"),
        "a launch, on the host": figure(2500, "ns"),
    }
    for blocks in (2, 4, 8, 16):
        for share in (128, 512, 2048):
            figures[f"exchange by st.async, {blocks} blocks, {share} bytes each"] = figure(300 + blocks * share / 20, "ns")
            figures[f"exchange by bulk copies, {blocks} blocks, {share} bytes each"] = figure(1, "ns")
    path.write_text(json.dumps({"schema": 1, "primitives": {"summary": "", "figures": figures | changes}}))
    return path


def test_measured_figures_take_the_place_of_the_built_in_ones(tmp_path):
    from stacked_lstm_ext.plan.persistent import persistent_plan, read_costs

    costs, device = read_costs(result_file(tmp_path / "result.json"), DEVICES["h100"])
    assert costs == pytest.approx(
        {
            "cluster_us": 0.3,
            "cluster_rate": 20 / 1.83,
            "l2_us": 0.4 + 20 / 1830,
            "l2_rate": 25,
            "l2_latency": 280,
            "hand_over_us": 0.9,
            "shared_rate": 120,
            "mma_latency": 32,
            "barrier": 20,
            "kernel_us": 3.2,
            "host_launch_us": 2.5,
            "host_product_us": 5.5,
        }
    )
    assert device == DEVICES["h100"] | {"mma_share": pytest.approx(0.7)}
    assert set(costs) <= set(_C.persistent_costs())
    slow, built_in = (persistent_plan(EIGHT, [512] * 8, costs=c)["forward"] for c in (costs, None))
    assert slow["terms"]["exchange"] > built_in["terms"]["exchange"]


@pytest.mark.parametrize(
    "changes",
    [{"latency of L2": {"error": "too many blocks"}}, {"latency of L2": figure(280, "cycles", wrong=3)}],
    ids=["an error", "wrong values"],
)
def test_what_failed_on_the_gpu_is_not_planned_with(tmp_path, changes):
    from stacked_lstm_ext.plan.persistent import read_costs

    costs, _ = read_costs(result_file(tmp_path / "result.json", **changes), DEVICES["h100"])
    assert "l2_latency" not in costs and costs["barrier"] == 20


@pytest.mark.parametrize(
    "text, message",
    [
        ("not json", "is no result file"),
        ('{"schema": 1}', "is no result file"),
        ('{"primitives": {"figures": {}}}', "holds no figure"),
        ('{"primitives": {"figures": {"latency of L2": {"unit": "ns", "median": 1, "wrong": 0}}}}', "cycles above 0, got: 1 ns"),
        ('{"primitives": {"figures": {"latency of L2": {"unit": "cycles", "median": 0, "wrong": 0}}}}', "above 0, got: 0"),
    ],
)
def test_a_file_that_is_no_result_is_an_error(tmp_path, text, message):
    from stacked_lstm_ext.plan.persistent import read_costs

    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_costs(path, DEVICES["h100"])


def test_every_figure_that_is_read_is_one_that_the_program_prints():
    from benchmarks.gpu.results import ROOT
    from stacked_lstm_ext.plan import persistent

    source = (ROOT / "benchmarks" / "primitives.cu").read_text()
    names = [name for name, _, _ in persistent._ONE_FIGURE.values()]
    names += ["tagged word through L2, one way", "reads from L2, all multiprocessors, 8 MiB", "exchange by st.async"]
    names += ["mma m16n8k16 bf16, one multiprocessor", "an empty kernel in a stream"]
    assert all(f'"{name}"' in source for name in names)


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    line = [sys.executable, "-W", "error::RuntimeWarning", "-m", "stacked_lstm_ext.plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_the_command_prints_the_plan_and_who_works_when():
    run = command("--layers", "8", "--hidden", "512", "--device", "h100", "--clusters-of-16", "8")
    assert (run.returncode, run.stderr) == (0, "")
    assert "All times are predicted" in run.stdout and "BACKWARD" not in run.stdout
    assert "clusters of 16 blocks" in run.stdout and "bound by exchange" in run.stdout
    assert "by diagonals" in run.stdout and "what would run: the persistent kernel" in run.stdout
    rows = [line.split()[-1] for line in run.stdout.splitlines() if line.startswith("pass 0 layer")]
    assert len(rows) == 8
    assert rows[0].index("0") < rows[7].index("0") and rows[0].rindex("9") < rows[7].rindex("9")


def test_the_command_says_what_changes_with_the_clusters_that_a_chip_holds():
    run = command("--layers", "8", "--hidden", "512", "--device", "h100", "--training")
    assert (run.returncode, run.stderr) == (0, "")
    table = run.stdout.split("clusters of 16 blocks they hold:\n")[1].splitlines()
    assert table[0].split() == ["clusters", "of", "16", "forward", "backward", "what", "would", "run"]
    for line, held in zip(table[1:4], (8, 7, 6), strict=True):
        assert line.startswith(str(held)) and ("planned for" in line) == (held == 7)
        assert line.count("clusters of 16, 1 pass" if held == 8 else "16 blocks through L2, 1 pass") == 2
    assert "clusters of 16" not in command("--hidden", "512", "--device", "a100").stdout
    assert "h  kept in the layer's one block" in command("--hidden", "16").stdout
    for device, number, message in (
        ("a100", "0", "a100 has no clusters of 16 blocks, got: 0"),
        ("h100", "9", "h100 holds 0 to 8 clusters of 16 blocks, got: 9"),
        ("h100", "-1", "h100 holds 0 to 8 clusters of 16 blocks, got: -1"),
    ):
        wrong = command("--hidden", "512", "--device", device, "--clusters-of-16", number)
        assert wrong.returncode == 2 and message in wrong.stderr


def test_the_command_prints_both_passes_of_training():
    run = command("--layers", "3", "--hidden", "256", "--recompute", "--steps", "40")
    assert run.returncode == 0, run.stderr
    forward, backward = run.stdout.split("BACKWARD: ")
    assert "training" in forward and "partial sums of dh" in backward and "large products" in backward
    first, _, last = [line.split()[-1] for line in backward.splitlines() if line.startswith("pass 0 layer")]
    assert last.index("0") < first.index("0"), "backward begins with the last layer"


def test_the_command_takes_a_width_for_each_layer():
    run = command("--hidden", "64,128,40", "--input", "7", "--batch", "70", "--dtype", "float32", "--training", "--device", "b200")
    assert run.returncode == 0 and "H 64,128,40" in run.stdout and "batch groups" in run.stdout
    assert "for 2 layers" in command("--hidden", "64,128,40", "--layers", "2").stderr


def test_the_command_says_why_not_and_what_would_run():
    run = command("--layers", "3", "--hidden", "1024", "--device", "l4")
    assert run.returncode == 0 and "58 SMs" in run.stdout and run.stderr == ""
    assert "what would run: the diagonals" in run.stdout


def test_the_command_plans_with_measured_costs(tmp_path):
    path = result_file(tmp_path / "result.json")
    run = command("--hidden", "256", "--costs", str(path))
    assert run.returncode == 0, run.stderr
    assert f"from {path}: " in run.stdout and "hand_over_us 0.9" in run.stdout
    missing = command("--hidden", "256", "--costs", str(tmp_path / "none.json"))
    assert missing.returncode == 2 and "is no result file" in missing.stderr


@pytest.mark.parametrize("more", [[], ["--training"]], ids=["forward", "training"])
def test_the_command_draws_the_picture(tmp_path, more):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    run = command("--layers", "4", "--hidden", "256", "--png", str(path), *more)
    assert run.returncode == 0, run.stderr
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in run.stdout


def test_without_matplotlib_the_command_says_so(monkeypatch, tmp_path, capsys):
    from stacked_lstm_ext.plan import persistent

    monkeypatch.setattr(persistent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        persistent.main(["--hidden", "64", "--png", str(tmp_path / "plan.png")])
    assert "needs matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())
