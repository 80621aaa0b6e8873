"""``python -m tests.sanitize [address] [thread]``: the CPU kernels under the sanitizers, with every schedule."""

from __future__ import annotations

import argparse
import sys

from . import FLAGS, clean, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="*", choices=[*FLAGS, []], help="default: all")
    failed = 0
    for sanitizer in parser.parse_args().sanitizers or list(FLAGS):
        result = run(sanitizer, stride=1)
        print(f"{sanitizer}:\n{result.stdout.strip() or 'no output'}")
        if not clean(result):
            print(result.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
