"""The examples run, and show what they say they show. Never how fast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

REPOSITORY = Path(__file__).parents[2]
TINY = ["--layers", "2", "--hidden", "16", "--batch", "4", "--seq-len", "8", "--steps", "12", "--sample", "40"]


def run(name, *arguments):
    command = [sys.executable, str(REPOSITORY / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}  # this checkout, whatever is installed
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def test_the_character_model_learns_the_same_with_both_and_prints_a_sample(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. [bold]" * 40)
    ran = run("char_lm.py", *TINY, "--text", str(text), "--prompt", "the ", "--device", "cpu", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "equal to rounding" in ran.stdout
    assert "times as fast" in ran.stdout
    sample = ran.stdout.split(" sample ")[1]
    assert sample.lstrip("─\n").startswith("the ")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_character_model_reads_the_standard_library_by_default(tmp_path):
    ran = run("char_lm.py", *TINY, "--characters", "20000", "--quick", "--device", "cpu", "--out", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "20,000 characters" in ran.stdout
    assert "2 layers of 16" in ran.stdout, "--quick overrode what was asked for"


def test_a_text_that_is_too_short_says_so(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    ran = run("char_lm.py", *TINY, "--text", str(text), "--out", str(tmp_path))
    assert ran.returncode == 1
    assert "error: the text has 5 characters, and a batch takes 32" in ran.stderr


def test_swapping_in_prints_the_module_and_its_plan():
    ran = run("swap_in.py")
    assert ran.returncode == 0, ran.stderr
    assert "StackedLSTM(32, 64, num_layers=6)" in ran.stdout
    assert "largest difference from nn.LSTM" in ran.stdout
