"""The folders of csrc: who may include whom, which files may know torch, and how a file begins."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

MAY_INCLUDE = {  # besides its own folder; a folder names only folders above it in this table, so there is no circle
    "stack": (),
    "cpu": ("stack",),
    "cuda": ("stack",),
    "driver": ("stack", "cuda"),
    "diagonal": ("stack", "cuda", "driver"),
    "persistent": ("stack", "cuda", "driver"),
    "torch": ("stack", "cpu", "cuda", "driver", "diagonal", "persistent"),
}
# Where torch's headers may be included, directly or through another file. Kernels and planners compile without torch.
MAY_KNOW_TORCH = re.compile(r"csrc/((driver|diagonal|torch)/.*|persistent/(bindings\.h|persistent\.h|decision\.cpp|driver\w*\.(h|cpp)))")
TORCH = re.compile(r"(torch|ATen|c10|caffe2|pybind11)/.*")
OF_THE_TESTS = {"emulator/device.h"}  # what primitives.cuh includes where a host plays the GPU


def sources(root: Path) -> list[Path]:
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))


def includes(path: Path) -> Iterator[tuple[int, str, str]]:
    """Every ``#include``: its line, ``"`` or ``<``, and the name."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := re.match(r'\s*#\s*include\s*(["<])([^">]+)[">]', line):
            yield number, match[1], match[2]


def own(path: Path) -> Iterator[tuple[int, Path]]:
    """The project's files that a file includes, and in which lines. Names are relative to the including file."""
    for number, mark, name in includes(path):
        if mark == '"' and name not in OF_THE_TESTS:
            yield number, (path.parent / name).resolve()


def misplaced(root: Path) -> list[str]:
    """Includes that the table does not allow, and files that are in no folder of the table."""
    found = []
    for path in sources(root):
        place = path.relative_to(root).as_posix()
        folder = path.parent.relative_to(root / "csrc").as_posix()
        if folder not in MAY_INCLUDE:
            found.append(f"{place}: no folder of the table")
            continue
        for line, other in own(path):
            if not other.exists() or other.parent.parent != root / "csrc":
                found.append(f"{place}:{line}: {other.name} is no file of csrc")
            elif other.parent != path.parent and other.parent.name not in MAY_INCLUDE[folder]:
                found.append(f"{place}:{line}: {folder} includes {other.parent.name}/{other.name}")
    return found


def torch_headers(path: Path, seen: set[Path]) -> list[str]:
    """Torch's headers that a file includes, directly or through the project's files."""
    if path in seen or not path.exists():
        return []
    seen.add(path)
    direct = [f"{path.name}:{line}: {name}" for line, _, name in includes(path) if TORCH.fullmatch(name)]
    return direct + [header for _, other in own(path) for header in torch_headers(other, seen)]


def test_files_include_only_what_lies_below_them():
    assert misplaced(ROOT) == []


def test_the_table_has_no_circle():
    folders = list(MAY_INCLUDE)
    for number, (folder, others) in enumerate(MAY_INCLUDE.items()):
        assert set(others) <= set(folders[:number]), folder
    assert {path.name for path in (ROOT / "csrc").iterdir()} == set(folders)


MISPLACED = [  # file, what it includes, what is said of it
    ("stack/a.h", '"../cpu/b.h"', ["csrc/stack/a.h:1: stack includes cpu/b.h"]),
    ("persistent/a.h", '"../diagonal/b.h"', ["csrc/persistent/a.h:1: persistent includes diagonal/b.h"]),
    ("diagonal/a.cpp", '"../persistent/b.h"', ["csrc/diagonal/a.cpp:1: diagonal includes persistent/b.h"]),
    ("cuda/a.cuh", '"../driver/b.h"', ["csrc/cuda/a.cuh:1: cuda includes driver/b.h"]),
    ("persistent/a.h", '"../driver/b.h"', []),
    ("persistent/a.h", '"b.h"', []),
    ("persistent/a.h", "<b.h>", []),
    ("torch/a.cpp", '"../cpu/c.h"', ["csrc/torch/a.cpp:1: c.h is no file of csrc"]),
    ("more/a.cpp", '"../stack/b.h"', ["csrc/more/a.cpp: no folder of the table"]),
]


@pytest.mark.parametrize("file, header, said", MISPLACED)
def test_an_include_upward_is_found(file, header, said, tmp_path):
    for folder in (*MAY_INCLUDE, "more"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    for folder in MAY_INCLUDE:
        (tmp_path / "csrc" / folder / "b.h").touch()
    (tmp_path / "csrc" / file).write_text(f"#include {header}\n")
    assert misplaced(tmp_path) == said


def test_what_compiles_without_torch_includes_none_of_it():
    found = {}
    for path in sources(ROOT):
        if not MAY_KNOW_TORCH.fullmatch(path.relative_to(ROOT).as_posix()):
            found[path.name] = torch_headers(path, set())
    assert {name: headers for name, headers in found.items() if headers} == {}
    assert {"plan.h", "kernels.h", "gates.h", "forward.cuh", "stack.h"} <= set(found)


def test_a_torch_header_is_found_through_another_file(tmp_path):
    (tmp_path / "a.h").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text('#include "a.h"\n#include <ATen/ATen.h>\n')
    assert torch_headers(tmp_path / "a.h", set()) == ["b.h:2: ATen/ATen.h"]


@pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_begins_with_its_place_and_what_it_is(path):
    assert re.match(rf"// {re.escape(path.relative_to(ROOT).as_posix())}: \S", path.read_text())


def test_no_two_sources_share_an_object():
    """Objects are named by folder and stem, whatever the suffix."""
    objects = [path.with_suffix("") for path in sources(ROOT) if path.suffix in (".cpp", ".cu")]
    assert len(objects) == len(set(objects))


def test_no_test_file_imports_another():
    """Only the folders of files that pytest collects are on sys.path: in a run of one file, the other's is not."""
    tests = list((ROOT / "tests").rglob("test_*.py"))
    names = [path.stem for path in tests]
    assert len(names) == len(set(names))
    importing = re.compile(rf"^\s*(from|import) ({'|'.join(names)})\b", re.MULTILINE)
    assert {path.name for path in tests if importing.search(path.read_text())} == set()


def test_no_file_is_too_long_to_read():
    longest = max(sources(ROOT), key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= 800, longest
