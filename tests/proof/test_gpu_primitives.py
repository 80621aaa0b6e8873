"""The program that measures what a GPU's primitives cost, on the emulator: that it ends, and that what arrives is right."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import primitives, report
from benchmarks.gpu.parts import Exit
from tests import emulator

SOURCE = emulator.ROOT / "benchmarks" / "primitives.cu"


@pytest.fixture(scope="module")
def figures():
    ran = emulator.run(emulator.build("primitives", [SOURCE]), "--rounds", "3")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


def test_every_primitive_ends_and_hands_over_what_was_sent(figures):
    failed = {name: figure for name, figure in figures.items() if "error" in figure or figure["wrong"]}
    assert not failed


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_clusters_of_every_size_are_measured(figures, size):
    names = [name for name in figures if f", {size} blocks" in name]
    assert any(name.startswith("barrier of a cluster") for name in names)
    assert any(name.startswith("exchange by st.async") for name in names)
    assert any(name.startswith("exchange by bulk copies") for name in names)


@pytest.mark.parametrize(
    "what", ["flag through L2", "tagged word", "barrier of the grid", "mbarrier", "shared memory", "reads from L2", "mma"]
)
def test_the_other_costs_of_the_model_are_measured(figures, what):
    assert any(what in name for name in figures)


def test_a_hand_over_that_waits_for_too_little_is_seen(tmp_path):
    """The exchange in a cluster, expecting half of the bytes: the program must not report figures as if all were well."""
    text = SOURCE.read_text()
    assert text.count("share * peers);") == 1
    broken = tmp_path / "primitives.cu"
    broken.write_text(text.replace("share * peers);", "share * peers / 2);"))
    ran = emulator.run(emulator.build("primitives-broken", [broken]), "--rounds", "3")
    assert ran.returncode == 1
    assert any("error" in figure for name, figure in json.loads(ran.stdout).items() if name.startswith("exchange"))


@pytest.mark.parametrize(
    "code, output, expected, words",
    [
        (0, '{"a": {"unit": "ns", "median": 1, "min": 1, "max": 1, "wrong": 0}}', Exit.OK, "1 primitives measured"),
        (1, '{"a": {"unit": "ns", "median": 1, "min": 1, "max": 1, "wrong": 7}}', Exit.FAILED, "a: wrong values"),
        (1, '{"a": {"error": "too many blocks"}}', Exit.FAILED, "a: too many blocks"),
        (1, '{"a": {"unit"', Exit.FAILED, "printed no figures"),
        (-9, '{"a": {"unit": "ns", "median": 1, "min": 1, "max": 1, "wrong": 0}', Exit.FAILED, "stopped after 1 primitives"),
    ],
)
def test_the_part_of_make_gpu_tells_good_runs_from_bad(code, output, expected, words):
    exit_code, summary, _ = primitives.judge(code, output, "what it said")
    assert exit_code == expected
    assert words in summary


def test_the_figures_stand_in_the_table_and_what_failed_is_seen(figures):
    lines = report.primitives_table({"primitives": {"figures": figures | {"odd": {"error": "too many blocks"}}}})
    assert len(lines) == 4 + len(figures) + 1
    assert any(line.startswith("| barrier of the grid |") and line.endswith("| ns |") for line in lines)
    assert lines[-1] == "| odd | **FAILED** | – | – | too many blocks |"
    assert report.primitives_table({}) == []


def test_the_program_of_the_clusters_asks_for_every_size_and_fills_no_more_than_the_device():
    """On the emulator's device: one block on a multiprocessor, and no cluster of which not all blocks fit."""
    ran = emulator.run(emulator.build("occupancy", [emulator.ROOT / "benchmarks" / "occupancy.cu"]))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    sizes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [size["cluster"] for size in sizes] == list(range(1, 17))
    most = sizes[0]["blocks"]
    assert most > 0 and all(size["blocks"] == size["clusters"] * size["cluster"] <= most for size in sizes)
