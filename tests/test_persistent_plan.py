"""The planner of the persistent kernel: no plan over any limit, nothing left out, no wait for what nobody makes.

Nothing runs the kernel yet, and nothing here needs a GPU: these are claims about plans (``csrc/persistent.h``).
"""

import itertools
import math
import os
import random
import subprocess
import sys

import pytest

from stacked_lstm_ext import _C

DEVICES = {device["name"]: device for device in _C.persistent_devices()}
ELEMENT_BYTES = (2, 4)
KEYS = ("device", "input_size", "hidden", "proj", "bidirectional", "steps", "batch", "bytes", "training")


def plan(stack, timeline=False):
    return _C.persistent_plan(*(stack[key] for key in KEYS), timeline)


def stack(device="h100", layers=1, hidden=512, **changes):
    hidden = hidden if isinstance(hidden, list) else [hidden] * layers
    default = {"proj": 0, "bidirectional": False, "steps": 64, "batch": 8, "bytes": 2, "training": False}
    return default | {"device": device, "hidden": hidden, "input_size": hidden[0]} | changes


def random_stacks(count, seed):
    draw = random.Random(seed)
    widths = (1, 8, 40, 64, 96, 128, 200, 256, 384, 512, 650, 768, 1000, 1024, 1300)
    for _ in range(count):
        layers = draw.choice((1, 1, 2, 3, 4, 5, 8, 12, 30))
        same = draw.random() < 0.6
        hidden = [draw.choice(widths)] * layers if same else [draw.choice(widths) for _ in range(layers)]
        yield stack(
            draw.choice(list(DEVICES)),
            hidden=hidden,
            input_size=draw.choice((1, 17, hidden[0], 64, 3000)),
            bidirectional=draw.random() < 0.2,
            steps=draw.choice((1, 2, 3, 17, 40, 512, 2000)),
            batch=draw.choice((1, 3, 8, 17, 32, 33, 100, 128, 1000)),
            bytes=draw.choice(ELEMENT_BYTES),
            training=draw.random() < 0.3,
        )


STACKS = list(random_stacks(4000, seed=4))


@pytest.fixture(scope="module")
def plans():
    made = [(s, plan(s)) for s in STACKS]
    assert sum(not p["why_not"] for _, p in made) > 3000, "too few of the stacks can be planned to test anything"
    return [(s, p) for s, p in made if not p["why_not"]]


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------


def over_a_limit(stack, plan):
    """What a launch of this plan would ask of a device beyond what it has, from published limits alone."""
    device = DEVICES[stack["device"]]
    directions = 1 + stack["bidirectional"]
    columns = 8 * plan["tiles"]
    for p in plan["passes"]:
        allocated = math.ceil(p["registers_thread"] / 8) * 8 * p["threads"]
        lanes = p["copies"] * len(p["layers"]) * directions
        yield "registers a thread", p["registers_thread"], 255
        yield "threads", p["threads"], 1024
        yield "registers an SM", allocated, device["registers_sm"]
        yield "shared memory a block", p["shared_bytes"], device["shared_block"]
        yield "blocks, one an SM", p["blocks"], device["sms"]
        yield "named barriers", p["groups"], 15
        yield "cluster", p["cluster"], device["max_cluster"] if p["exchange"] == "cluster" else 1
        if p["exchange"] == "cluster":
            yield "clusters", lanes, device["gpcs"] * (device["sms_gpc"] // p["cluster"])
        if p["exchange"] == "block":
            yield "blocks of a lane that has no exchange", max(layer["blocks"] for layer in p["layers"]), 1
        yield "L2", sum(layer["l2_bytes"] for layer in p["layers"]), device["l2_bytes"]
        for layer in p["layers"]:
            padded_k = 16 * p["splits"] * layer["k_steps"]
            fragments = layer["weight_registers"] * 4 * p["threads"]
            least = 2 * columns * layer["hidden"] * stack["bytes"]  # two buffers of h
            if layer["w_ih"] == "shared":
                least += layer["w_ih_bytes"] // (directions * layer["blocks"])
            yield "registers of a layer", layer["registers_thread"], p["registers_thread"]
            yield "fragments in registers", layer["weight_registers"] + 8 * plan["tiles"], layer["registers_thread"]
            yield "shared memory of a layer", layer["shared_bytes"], p["shared_bytes"]
            yield "h and W_ih in shared memory", least, layer["shared_bytes"]
            yield "recurrent rows", layer["hidden"], padded_k
            yield "W_hh in fragments", layer["registers_bytes"], fragments * layer["blocks"] * directions
            yield "W_hh", 4 * layer["hidden"] ** 2 * stack["bytes"] * directions, layer["registers_bytes"]


def test_no_plan_is_over_any_limit(plans):
    for s, p in plans:
        for what, asked, there in over_a_limit(s, p):
            assert asked <= there, f"{what}: {asked} of {there}, for {s}"


def test_every_layer_is_in_one_pass_and_every_unit_has_one_owner(plans):
    for s, p in plans:
        layers = [layer["layer"] for each in p["passes"] for layer in each["layers"]]
        assert layers == list(range(len(s["hidden"]))), s
        for each in p["passes"]:
            assert [layer["layer"] for layer in each["layers"]] == list(range(each["first_layer"], each["last_layer"]))
            for layer in each["layers"]:
                owned = [unit for first, last in layer["units"] for unit in range(first, last)]
                assert owned == list(range(s["hidden"][layer["layer"]])), s
                assert all(0 < last - first <= each["units_block"] for first, last in layer["units"]), s
                assert len(layer["units"]) == layer["blocks"]


def test_every_sequence_is_in_one_batch_group(plans):
    for s, p in plans:
        assert [b for first, last in p["sequences"] for b in range(first, last)] == list(range(s["batch"]))
        assert all(0 < last - first <= 8 * p["tiles"] for first, last in p["sequences"])
        assert all(each["copies"] * each["rounds"] >= p["batch_groups"] for each in p["passes"])


def test_a_bidirectional_layer_is_a_pass_of_its_own(plans):
    for s, p in plans:
        assert not s["bidirectional"] or all(len(each["layers"]) == 1 for each in p["passes"])


# --------------------------------------------------------------------------------------------------------------------
# Who waits for whom
# --------------------------------------------------------------------------------------------------------------------

SHORT = [s for s in STACKS if s["steps"] <= 40 and s["batch"] <= 128 and len(s["hidden"]) <= 12][:600]


@pytest.fixture(scope="module")
def timelines():
    made = [(s, plan(s, timeline=True)) for s in SHORT]
    return [(s, p) for s, p in made if not p["why_not"]]


def test_every_chunk_is_worked_on_once_by_the_blocks_that_own_its_lane(timelines):
    for s, p in timelines:
        expected, got = set(), [work[1:5] for work in p["timeline"]]
        for each in p["passes"]:
            layers, directions = range(each["first_layer"], each["last_layer"]), range(1 + s["bidirectional"])
            chunks = range(math.ceil(s["steps"] / each["chunk_steps"]))
            expected |= set(itertools.product(range(p["batch_groups"]), layers, directions, chunks))
        assert len(got) == len(set(got)) and set(got) == expected, s
        for number, _, layer, _, _, first, blocks, *_ in p["timeline"]:
            each = p["passes"][number]
            assert each["first_layer"] <= layer < each["last_layer"]
            assert first >= 0 and first + blocks <= each["blocks"] <= DEVICES[s["device"]]["sms"]
            # A cluster is as many neighbouring blocks, from a multiple of its size on.
            assert each["exchange"] != "cluster" or first % each["cluster"] + blocks <= each["cluster"], s


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
        for number, _, layer, _, chunk, _, _, needs_layer, needs_chunks, _, _ in p["timeline"]:
            if layer == 0:
                assert needs_layer == -1
                continue
            assert needs_layer == layer - 1
            here = p["passes"][number]
            below = next(each for each in p["passes"] if each["first_layer"] <= layer - 1 < each["last_layer"])
            there = min(needs_chunks * below["chunk_steps"], s["steps"])
            last = s["steps"] if s["bidirectional"] else min((chunk + 1) * here["chunk_steps"], s["steps"])
            assert there >= last, f"layer {layer} chunk {chunk} reads {last} steps and waits for {there}, for {s}"


def test_nobody_waits_for_ever(timelines):
    """Each lane's blocks take their chunks in order, passes one after another; whatever moves, all comes to the end."""
    for s, p in timelines:
        done = {}
        for number in range(len(p["passes"])):
            queues = {}
            for work in p["timeline"]:
                if work[0] == number:
                    queues.setdefault(work[5], []).append(work)
            while queues:
                moved = False
                for place, queue in sorted(queues.items(), reverse=True):  # the upper layers first
                    _, group, layer, direction, chunk, _, _, needs_layer, needs_chunks, _, _ = queue[0]
                    lanes = [(group, needs_layer, d) for d in range(1 + s["bidirectional"])] if needs_layer >= 0 else []
                    if all(done.get(lane, 0) >= needs_chunks for lane in lanes):
                        assert done.get((group, layer, direction), 0) == chunk, "the chunks of a lane come in order"
                        done[group, layer, direction] = chunk + 1
                        queue.pop(0)
                        moved = True
                        if not queue:
                            del queues[place]
                assert moved, f"deadlock of {[queue[0][:5] for queue in queues.values()]} for {s}"


def test_the_timeline_keeps_its_waits_and_ends_when_predicted(timelines):
    for s, p in timelines:
        ends = {}
        for _, group, layer, direction, chunk, _, _, needs_layer, needs_chunks, start, end in p["timeline"]:
            assert end > start
            if needs_layer >= 0:
                ready = max(ends[group, needs_layer, d, needs_chunks - 1] for d in range(1 + s["bidirectional"]))
                assert start >= ready, f"layer {layer} chunk {chunk} starts before what it reads is there, for {s}"
            if chunk:
                assert start >= ends[group, layer, direction, chunk - 1]
            ends[group, layer, direction, chunk] = end
        assert max(ends.values()) == pytest.approx(p["predicted_us"], rel=1e-9), s


# --------------------------------------------------------------------------------------------------------------------
# Predictions
# --------------------------------------------------------------------------------------------------------------------


def test_no_prediction_is_below_the_physical_limit(plans):
    for s, p in plans:
        device, directions = DEVICES[s["device"]], 1 + s["bidirectional"]
        inputs = [s["input_size"]] + [directions * h for h in s["hidden"][:-1]]
        weights = sum(4 * h * (i + h) * directions for i, h in zip(inputs, s["hidden"], strict=True))
        per_us = device["sms"] * device["mma_rate"] * device["clock_mhz"] / (s["bytes"] / 2)
        limit = max(weights * s["bytes"] / device["memory_gb_s"] / 1e3, weights * s["batch"] * s["steps"] / per_us)
        assert p["limit_us"] == pytest.approx(limit)
        assert p["predicted_us"] >= limit, s


def test_the_terms_of_a_prediction_add_up(plans):
    for s, p in plans:
        assert all(us >= 0 for us in p["terms"].values()), s
        assert sum(p["terms"].values()) == pytest.approx(p["predicted_us"])
        assert p["terms"][p["binds"]] == max(p["terms"].values())
        for each in p["passes"]:
            terms = each["terms"]
            assert sum(terms.values()) == pytest.approx(terms["launch"] + terms["load"] + each["rounds"] * each["makespan_us"])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s | {"hidden": s["hidden"] + [s["hidden"][-1]]},
        lambda s: s | {"hidden": s["hidden"] + [200]},
        lambda s: s | {"steps": s["steps"] + 1},
        lambda s: s | {"steps": 2 * s["steps"]},
        lambda s: s | {"batch": s["batch"] + 1},
        lambda s: s | {"batch": s["batch"] + 100},
        lambda s: s | {"training": True},
        lambda s: s | {"input_size": s["input_size"] + 100},
    ],
    ids=["deeper", "deeper, 200 units", "a step longer", "twice as long", "a sequence more", "more sequences", "training", "wider input"],
)
def test_more_work_is_never_cheaper(plans, change):
    for s, p in plans[:500]:
        more = plan(change(s))
        assert more["why_not"] or more["predicted_us"] >= p["predicted_us"] * (1 - 1e-9), (s, change(s))


def test_depth_is_nearly_free_where_the_layers_fit():
    one, sixteen = (plan(stack("h100", layers, 256, steps=512))["predicted_us"] for layers in (1, 16))
    assert sixteen <= 1.5 * one


@pytest.mark.parametrize("hidden, low, high", [(512, 0.58, 0.93), (256, 0.47, 0.67)])
def test_a_step_is_predicted_within_the_range_of_the_prototype(hidden, low, high):
    assert low <= plan(stack("h100", 8, hidden, steps=512))["step_us"] <= high


# --------------------------------------------------------------------------------------------------------------------
# What is planned, and what is refused
# --------------------------------------------------------------------------------------------------------------------


def test_layers_of_different_widths_share_a_launch():
    p = plan(stack("h100", hidden=[256, 64, 200, 128, 8], input_size=30))
    (only,) = p["passes"]
    assert [layer["hidden"] for layer in only["layers"]] == [256, 64, 200, 128, 8]
    assert len({layer["blocks"] for layer in only["layers"]}) > 1 and only["exchange"] == "cluster"
    assert [layer["first_block"] % only["cluster"] for layer in only["layers"]] == [0] * 5


def test_what_does_not_fit_at_once_is_split_into_passes():
    p = plan(stack("h100", 24, 512))
    assert [(each["first_layer"], each["last_layer"]) for each in p["passes"]] == [(0, 8), (8, 16), (16, 24)]


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_clusters_are_for_devices_that_have_them(device):
    exchange = {each["exchange"] for each in plan(stack(device, 4, 256))["passes"]}
    assert exchange == ({"cluster"} if DEVICES[device]["capability"] >= (9, 0) else {"l2"})


def test_a_layer_wider_than_a_cluster_goes_through_l2():
    assert {each["exchange"] for each in plan(stack("h100", 2, 1024))["passes"]} == {"l2"}


REFUSED = [  # what, and the numbers that its refusal names
    (stack("l4", 2, 1024), ["1024", "64 blocks", "58 SMs"]),
    (stack("h100", hidden=[64, 2000]), ["layer 1", "2000", "132 SMs"]),
    (stack("h100", 1, 4096), ["layer 0", "4096", "2048"]),
    (stack("a100", 1, 1024, bytes=4), ["1024", "4 bytes", "128 blocks", "108 SMs"]),
    (stack("h100", 1, 64, bytes=8), ["8 bytes", "2 or 4"]),
    (stack("h100", 2, 64, proj=20), ["layer 0", "20"]),
    (stack("h100", 2, 64, steps=0), ["2 layers", "0 steps"]),
    (stack("h100", 2, 64, batch=0), ["batch 0"]),
    (stack("h100", 1, 1000, bidirectional=True, bytes=4), ["1000", "SMs"]),
]


@pytest.mark.parametrize("refused, numbers", REFUSED, ids=[str(numbers) for _, numbers in REFUSED])
def test_a_refusal_is_a_sentence_with_numbers(refused, numbers):
    p = plan(refused, timeline=True)
    assert p["passes"] == [] and p["timeline"] == []
    for number in numbers:
        assert number in p["why_not"], p["why_not"]


def test_every_refusal_of_the_sweep_names_numbers():
    refusals = {plan(s)["why_not"] for s in STACKS[:1500]} - {""}
    assert refusals and all(any(c.isdigit() for c in why) for why in refusals)
    assert not any(why.startswith("no partition") for why in refusals), "a reason is missing from obstacle()"


@pytest.mark.parametrize(
    "wrong, message",
    [({"device": "v100"}, "a100.*got: v100"), ({"hidden": [8, 0]}, "hidden.*got: 0"), ({"input_size": 0}, "got: 0")],
)
def test_what_is_no_stack_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(stack() | wrong)


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    line = [sys.executable, "-W", "error::RuntimeWarning", "-m", "stacked_lstm_ext.plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_the_command_prints_the_plan_and_who_works_when():
    run = command("--layers", "8", "--hidden", "512", "--device", "h100")
    assert (run.returncode, run.stderr) == (0, "")
    assert "does not run in this version" in run.stdout and "predicted" in run.stdout
    assert "clusters of 16 blocks" in run.stdout and "bound by exchange" in run.stdout
    rows = [line.split()[-1] for line in run.stdout.splitlines() if line.startswith("pass 0 layer")]
    assert len(rows) == 8
    assert rows[0].index("0") < rows[7].index("0") and rows[0].rindex("9") < rows[7].rindex("9")


def test_the_command_takes_a_width_for_each_layer():
    run = command("--hidden", "64,128,40", "--input", "7", "--batch", "70", "--dtype", "float32", "--training", "--device", "b200")
    assert run.returncode == 0 and "H 64,128,40" in run.stdout and "batch groups" in run.stdout
    assert "for 2 layers" in command("--hidden", "64,128,40", "--layers", "2").stderr


def test_the_command_says_why_not():
    run = command("--layers", "3", "--hidden", "1024", "--device", "l4")
    assert run.returncode == 1 and "58 SMs" in run.stdout and run.stderr == ""


def test_the_command_draws_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    run = command("--layers", "4", "--hidden", "256", "--png", str(path))
    assert run.returncode == 0, run.stderr
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in run.stdout


def test_without_matplotlib_the_command_says_so(monkeypatch, tmp_path, capsys):
    from stacked_lstm_ext.plan import persistent

    monkeypatch.setattr(persistent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        persistent.main(["--hidden", "64", "--png", str(tmp_path / "plan.png")])
    assert "needs matplotlib" in capsys.readouterr().err and not list(tmp_path.iterdir())
