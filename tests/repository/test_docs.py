"""The docs point to what exists: every link to a file and to a heading, every name that a page says stands in a source."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# A link to a file of the repository and, behind it, names in backticks that are said to stand there.
NAMED = re.compile(r"\]\(([^)#\s]+)\)((?:,? `\w+`)+)")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading):
    """As GitHub makes it: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def anchors(page):
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+://", target):
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}, and there is no such file"
        if heading:
            assert heading in anchors(there), f"{page.name} links to {target}, and {there.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_stands_in_the_source_it_is_said_to(page):
    for target, names in NAMED.findall(page.read_text()):
        source = (page.parent / target).resolve()
        if not source.is_file():
            continue
        text = source.read_text()
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b{name}\b", text), f"{page.name} says that {name} is in {target}"


def absent(text):
    """Paths of the repository that a text names, wherever they stand, and that are not there; `*` is for any name."""
    paths = re.findall(r"(?<![\w./-])(?:csrc|tests|docs|examples|stacked_lstm_ext)/[\w*/-]+(?:\.\w+)*", text)
    return sorted({path for path in paths if not any(REPOSITORY.glob(path.rstrip("/")))})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page):
    assert absent(page.read_text()) == []


MAKE_UP = ("proof", "repository")


def test_every_file_that_a_source_names_is_there():
    """Not in tests/proof and tests/repository, which make up sources. A path without a suffix may be the beginning of a name."""
    sources = [path for place in ("csrc", "stacked_lstm_ext", "benchmarks", "tests") for path in (REPOSITORY / place).rglob("*")]
    read = [path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu") and path.parent.name not in MAKE_UP]
    found = {path.relative_to(REPOSITORY).as_posix(): [name for name in absent(path.read_text()) if "." in name] for path in read}
    assert {place: names for place, names in found.items() if names} == {}


def test_a_path_that_is_not_there_is_found():
    text = "`tests/cpu/test_maths.py`, (csrc/stack/*.h). tests/test_maths.py, [a](../docs/api.md), `csrc/cpu/`, csrc/gpu/"
    assert absent(text) == ["csrc/gpu/", "tests/test_maths.py"]


def test_the_kernels_page_names_a_source_for_each_idea():
    """The check above would be empty if links and names were written in another way."""
    assert len(NAMED.findall((REPOSITORY / "docs" / "kernels.md").read_text())) >= 15


def test_what_the_ideas_are_predicted_to_save_follows_from_the_cost_model_s_figures():
    """By hand on the page, L = 8, H = 512, B = 8 in 16 bits: clusters of 16 blocks of 32 units, 128 gate rows each."""
    from stacked_lstm_ext.ops import _C

    costs = _C.persistent_costs()
    (h100,) = [device for device in _C.persistent_devices() if device["name"] == "h100"]
    plan = _C.persistent_plan(h100 | {"short_gpcs": 0}, 512, [512] * 8, 0, False, 512, 8, 2)
    (launched,) = plan["passes"]
    cut = launched["cut"]
    assert (cut["exchange"], cut["blocks"], cut["groups"]) == ("cluster", 16, 4)
    chunk = cut["chunk_steps"]
    clock, memory = h100["clock_mhz"], 1e3 * h100["memory_gb_s"]  # cycles and bytes a µs
    weights = 128 * 512 * 2 / costs["shared_rate"] / clock
    patches = 16 * 32 * 8 * 4 / costs["cluster_rate"] / clock
    gathered = 4 * 512 * 8 * 2 / costs["cluster_rate"] / clock
    predicted = {
        "gates never leave registers": (costs["barrier"] + 2 * costs["shared_latency"]) / clock,
        "W_hh in registers": weights,
        "no packing": 8 * 2 * (4 * 512 * 512 * 2) * 2 / memory,
        "h pushed, bytes counted": 2.5 - 0.4,  # published
        "the same through L2, tagged words": 1.0 - 0.5,  # published
        "input projection for 4 steps at once": weights * (1 - 1 / 4),
        "hand-over off the critical path": costs["hand_over_us"],
        "partial dh, scattered": gathered - patches,
        "the layer above in the same sum": costs["cluster_us"],
        "slopes before dh": costs["gate_latency"] / clock,
    }
    page = (REPOSITORY / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\|[^|]*\| ([^|]+) \| [^|]+ \| ([\d.]+) µs[^|]* \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(predicted)
    for name, written in rows:
        assert float(written) == pytest.approx(predicted[name], rel=0.1), name
    assert f"W_hh in registers | in shared memory, read every step | {weights:.2f} µs" in page
    fewer = f"{8 * 512 / (512 + 7 * chunk):.1f} times fewer with the planner's C = {chunk}"
    assert fewer in " ".join(page.split())  # wherever its lines break
    assert "kProjectedTiles = 4," in (REPOSITORY / "csrc" / "persistent" / "kernels.h").read_text()


def test_the_predicted_times_on_the_kernels_page_are_what_the_planner_says_now():
    from benchmarks.gpu import expected

    page = (REPOSITORY / "docs" / "kernels.md").read_text()
    now = expected.completed(page, "h100")
    assert page == now, (
        "the planner, or docs/slots.txt, has changed: python -m benchmarks.gpu.expected --write docs/kernels.md"
    )


@pytest.mark.parametrize("page", ["", "<!-- expected:begin -->", "<!-- expected:end --><!-- expected:begin -->"])
def test_a_page_without_markers_is_left_alone(page, tmp_path, capsys):
    from benchmarks.gpu import expected

    path = tmp_path / "page.md"
    path.write_text(page)
    assert expected.main(["--write", str(path)]) == 2
    assert "the page needs one <!-- expected:begin -->" in capsys.readouterr().err
    assert path.read_text() == page


def test_what_the_machine_code_takes_is_quoted_as_it_stands(tmp_path):
    from benchmarks.gpu import expected

    slots = tmp_path / "slots.txt"
    slots.write_text("slots a step  all\nforward       300\n")
    page = "<!-- step:begin -->\nold\n<!-- step:end -->\n<!-- expected:begin -->\n<!-- expected:end -->\n"
    written = expected.completed(page, "h100", slots)
    assert "<!-- step:begin -->\n```\nslots a step  all\nforward       300\n```\n<!-- step:end -->" in written
    assert expected.completed(page, "h100", tmp_path / "absent").startswith("<!-- step:begin -->\nold\n")
