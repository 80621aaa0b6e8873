"""The PTX of a CUDA source, made once: ``make cuda-check`` assembles it, and ``make ptx`` runs it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Others that want the same file wait here instead of making it once more."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(source: Path, nvcc: Sequence[str | Path], version: str, headers: Iterable[Path], folder: Path) -> Path:
    """The PTX that the command ``nvcc`` makes of ``source``. Its name tells what it was made from, so that it is never stale:
    the command, the compiler's ``version``, the source, and the ``headers`` that it may include.

    Raises:
        subprocess.CalledProcessError: with what nvcc said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join(map(str, [version, source, *nvcc])).encode())
    stem = f"{source.stem}-{digest.hexdigest()[:8]}"
    with _locked(folder / f"{stem}.lock"):
        for path in (source, *headers):
            digest.update(f"\0{path}\0".encode() + path.read_bytes())
        target = folder / f"{stem}-{digest.hexdigest()[:16]}.ptx"
        if not target.exists():
            for old in folder.glob(f"{stem}-*.ptx"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / target.name
                subprocess.run([*nvcc, "-ptx", source, "-o", made], check=True, capture_output=True, text=True)
                made.rename(target)
    return target
