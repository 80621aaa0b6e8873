"""Mutants of inline PTX that the machine lets pass, each with the reason. ``mutants.py`` expects exactly these to survive.

An entry names its mutants by regular expressions that have to match in full: the function, the template, the kind and the
change, as ``python -m tests.ptx.mutants --list`` prints them. One that names a killed mutant, or no survivor, is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .mutations import Mutant


@dataclass(frozen=True)
class Equivalent:
    function: str
    kind: str
    change: str
    reason: str
    template: str = ".*"
    emulator: str = ""  # a case of the emulator's self-tests that is the same mistake in C++, and is noticed there
    architectures: str = "80|90a"

    def names(self, mutant: Mutant, architecture: str) -> bool:
        pairs = [(self.function, mutant.statement.function), (self.kind, mutant.kind), (self.change, mutant.change)]
        pairs += [(self.template, " ".join(mutant.template.split())), (self.architectures, architecture)]
        return all(re.fullmatch(pattern, text) for pattern, text in pairs)

    def __str__(self) -> str:
        return f"{self.function}: {self.kind}: {self.change} ({self.reason})"


ACCESSES = "load_acquire|load_relaxed|store_release|store_relaxed|add_release"
SCOPED = f"{ACCESSES}|fence"
EQUIVALENT: list[Equivalent] = [
    # ---- more order than is needed
    Equivalent(
        SCOPED,
        "scope",
        r"\.(cluster|gpu|sys) for \.cta .*|\.(gpu|sys) for \.cluster .*|\.sys for \.gpu .*",
        "a wider scope includes the narrower one",
    ),
    Equivalent(
        SCOPED,
        "scope",
        r"\.gpu for \.sys .*",
        "the two differ for the host and other devices alone, which take no part in a launch",
    ),
    Equivalent("load_relaxed", "qualifier", r"\.acquire for \.relaxed .*", "an acquire is a relaxed load that orders more"),
    Equivalent("store_relaxed", "qualifier", r"\.release for \.relaxed .*", "a release is a relaxed store that orders more"),
    Equivalent("fence|mbarrier_init_fence", "qualifier", r"\.sc for \.acq_rel .*", "a fence.sc is a fence.acq_rel that orders more"),
    Equivalent("mbarrier_test|mbarrier_wait", "qualifier", r"\.acquire for \.relaxed .*", "the fence behind it acquires, too"),
    Equivalent("load_peer", "qualifier", r"\.volatile added .*", "a volatile load is a relaxed one; the barriers order plain ones"),
    # ---- another way to write the same
    Equivalent(
        ACCESSES, "space", r"\.global dropped .*", "a generic address of global memory is its address in the state space"
    ),
    Equivalent(".*", "space", r"\.shared(::cta)? for \.shared(::cta)? .*", ".shared is short for .shared::cta"),
    Equivalent(
        "mbarrier_arrive_expect|mbarrier_expect",
        "space",
        r"\.shared::cluster for \.shared::cta .*",
        "the block's own window of shared memory lies in that of its cluster",
    ),
    Equivalent(
        "(?!peer_address).*",
        "sign",
        r"\.s(32|64) for \.u(32|64) .*",
        "as many bits; nothing here is compared, divided or made wider",
    ),
    Equivalent("lesser_or_nan", "operand swap", "%1 and %2 .*", "min is commutative"),
    # ---- as good
    Equivalent("mbarrier_test", "size", "2 for 1 .*", "any number but 0 says that the phase is over"),
    Equivalent("mbarrier_test", "operation", r"\.try_wait for \.test_wait .*", "it may wait a while before it says the same"),
    Equivalent("mbarrier_wait", "operation", r"\.test_wait for \.try_wait .*", "the loop asks more often, and the thread is not suspended"),
    Equivalent(
        "mbarrier_test|mbarrier_wait",
        "instruction",
        "fence.acquire.sync_restrict::shared::cluster.cluster before .*",
        "it comes behind the last test all the same",
    ),
    Equivalent("mbarrier_expect", "scope", r"\.cluster for \.cta .*", "what is expected is relaxed, and orders nothing at any scope"),
    Equivalent(
        "copy_async",
        "qualifier",
        r"\.ca for \.cg .*",
        "where it is cached: the machine has no caches. The emulator knows that 16 bytes go past the L1, and what the L1 may show",
        emulator="a number that the L1 holds, read again without an acquire",
    ),
    # ---- not seen here
    Equivalent(
        "mbarrier_init_fence",
        "instruction",
        "fence.acq_rel.cta dropped",
        "a barrier of the block follows, and orders the initialisation; it is here so that one source serves both architectures",
        emulator="init_not_fenced",
        architectures="80",
    ),
    Equivalent("mbarrier_init_fence", "scope", r"\.(gpu|sys) for \.cta .*", "a wider scope includes the narrower one"),
]
