"""The PTX of a CUDA source, made once: ``make cuda-check`` assembles it, and ``make ptx`` runs it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Others that want the same file wait here instead of making it once more."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def included(source: Path, folders: Sequence[Path]) -> tuple[Path, ...]:
    """The headers that ``source`` includes in quotes, and those that they do: beside the file that includes it, or in ``folders``."""
    found: dict[Path, None] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            header = next((place.resolve() for place in (folder / name for folder in (path.parent, *folders)) if place.exists()), None)
            if header and header not in found:
                found[header] = None
                pending.append(header)
    return tuple(sorted(found))


@dataclass(frozen=True)
class Recipe:
    """How the PTX of a source is made, and where it lies. Its name tells what it was made from, so that it is never stale:
    the command, the compiler's version, the source, and the headers that it includes."""

    source: Path
    nvcc: tuple[str | Path, ...]  # the command
    version: str
    headers: tuple[Path, ...]
    folder: Path

    @property
    def stem(self) -> str:
        digest = hashlib.sha256("\0".join(map(str, [self.version, self.source, *self.nvcc])).encode())
        return f"{self.source.stem}-{digest.hexdigest()[:8]}"

    @property
    def target(self) -> Path:
        digest = hashlib.sha256()
        for path in (self.source, *self.headers):
            digest.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
        return self.folder / f"{self.stem}-{digest.hexdigest()[:16]}.ptx"

    def make(self) -> Path:
        """The file, made where it is not there.

        Raises:
            subprocess.CalledProcessError: with what nvcc said.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{self.stem}.lock"):
            target = self.target
            if not target.exists():
                for old in self.folder.glob(f"{self.stem}-*.ptx"):
                    old.unlink()
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    made = Path(scratch) / target.name
                    subprocess.run([*self.nvcc, "-ptx", self.source, "-o", made], check=True, capture_output=True, text=True)
                    made.rename(target)
        return target
