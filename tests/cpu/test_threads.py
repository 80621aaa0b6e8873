"""Threads of every kind: torch's pool, Python's, forked processes, DataLoader workers, interrupted calls."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings

import pytest
import torch
from helpers import (
    Case,
    assert_matches,
    assert_same_bits,
    backward_arguments,
    case_tolerance,
    forward_arguments,
    make_input,
    pair,
    results,
)
from torch.utils.data import DataLoader, Dataset

import stacked_lstm_ext
from stacked_lstm_ext import StackedLSTM

ops = torch.ops.stacked_lstm_ext


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    "case",
    [Case(1, 1, 1, 1, 1), Case(4, 2, 30, 8, 16), Case(2, 16, 8, 32, 70), Case(2, 3, 9, 4, 8, bidirectional=True)],
    ids=str,
)
def test_any_number_of_threads_matches_stock(case, threads):
    """More threads than cores and more than there is work for, too."""
    ours, stock = pair(**case.arguments())
    x, hx = make_input(case)
    expected = results(stock, x, hx)
    torch.set_num_threads(threads)
    assert_matches(results(ours, x, hx), expected, case_tolerance(case, torch.float64), case.directions)
    assert torch.get_num_threads() == threads, "the caller's setting stands"


def run_in_threads(jobs):
    """Start all jobs together; raise what any of them raised."""
    errors, start = [], threading.Barrier(len(jobs))

    def run(job):
        try:
            start.wait(60)
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a call did not come back"
    if errors:
        raise errors[0]


def test_many_python_threads_with_a_module_each():
    cases = [Case(layers, 3, 12, 5, 8 + layers, bidirectional=layers % 2 == 0) for layers in range(1, 7)]
    modules = [StackedLSTM(**case.arguments(), recompute=case.layers > 3) for case in cases]
    inputs = [make_input(case, torch.float32) for case in cases]
    alone = [results(m, x, hx) for m, (x, hx) in zip(modules, inputs, strict=True)]

    def job(i):
        def run():
            for _ in range(8):
                assert_same_bits(results(modules[i], *inputs[i]), alone[i])

        return run

    run_in_threads([job(i) for i in range(len(cases))])


def test_one_module_called_from_many_python_threads():
    case = Case(3, 4, 10, 6, 20)
    module = StackedLSTM(**case.arguments())
    inputs = [make_input(case, torch.float32, seed) for seed in range(6)]
    alone = [results(module, x, hx) for x, hx in inputs]

    def job(i):
        return lambda: [assert_same_bits(results(module, *inputs[i]), alone[i]) for _ in range(8)]

    run_in_threads([job(i) for i in range(len(inputs))])


def test_the_last_run_and_the_forced_backend_belong_to_their_thread():
    main_module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    seen = {}

    def job():
        seen["before"] = stacked_lstm_ext.last_run()
        with stacked_lstm_ext.backend("reference"):
            StackedLSTM(3, 5, 3)(x)
            seen["inside"] = stacked_lstm_ext.last_run()["backend"]
            forced.set()
            release.wait(60)

    forced, release = threading.Event(), threading.Event()
    main_module(x)
    thread = threading.Thread(target=job)
    thread.start()
    assert forced.wait(60)
    main_module(x)
    run = stacked_lstm_ext.last_run()
    release.set()
    thread.join()
    assert run["backend"] == "cpu" and run["layers"] == 2
    assert seen == {"before": None, "inside": "reference"}


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_gil_is_released_during_a_call(which):
    """With a switch interval of minutes, another Python thread runs only while the call has let go of the GIL."""
    arguments = forward_arguments(Case(4, 8, 200, 64, 128), torch.float32)
    output, h_n, c_n, reserve = ops.forward(*arguments)
    calls = {
        "forward": lambda: ops.forward(*arguments),
        "backward": lambda: ops.backward(*backward_arguments([output, h_n, c_n], arguments, output, reserve)),
    }
    ticks, stop, started = [0], threading.Event(), threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            started.set()
            time.sleep(1e-4)

    thread = threading.Thread(target=tick, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(600)
    try:
        thread.start()
        assert started.wait(60)
        progress = 0
        for _ in range(20):
            before = ticks[0]
            calls[which]()
            progress += ticks[0] - before
        assert progress > 0
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join(60)


# --------------------------------------------------------------------------------------------------------------------
# Processes
# --------------------------------------------------------------------------------------------------------------------


def child(module, x, hx, queue):
    torch.set_num_threads(1)  # as DataLoader workers do; OpenMP itself does not survive a fork with more
    named = results(module, x, hx)
    queue.put({name: value.numpy() for name, value in named.items()})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same_after_the_parent_has_used_its_threads():
    case = Case(4, 6, 40, 16, 32)
    module = StackedLSTM(**case.arguments())
    x, hx = make_input(case, torch.float32)
    expected = results(module, x, hx)  # the parent's pool is up now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(module, x, hx, queue), daemon=True)
    process.start()
    try:
        got = queue.get(timeout=120)
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
    got = {name: torch.from_numpy(value) for name, value in got.items()}
    assert_matches(got, expected, case_tolerance(case, torch.float32))
    assert_same_bits(results(module, x, hx), expected)  # and the parent still works


class Sequences(Dataset):
    """Items that are computed by an LSTM inside the worker."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = StackedLSTM(3, 5, 2)
        self.data = torch.randn(8, 6, 3)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(self.data[i])[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_dataloader_workers(start_method):
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {start_method}")
    data = Sequences()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=start_method, timeout=120)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


class Interrupted(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
def test_an_interrupted_call_leaves_nothing_broken():
    """A signal handler that raises, at many moments of forward and backward passes."""
    case = Case(4, 8, 60, 32, 64)
    module = StackedLSTM(**case.arguments())
    x, hx = make_input(case, torch.float32)
    expected = results(module, x, hx)

    def interrupt(*_):
        raise Interrupted

    previous, hits = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for i in range(30):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-3 * (1 + i))
                while True:
                    results(module, x, hx)
            except Interrupted:
                hits += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            if i % 10 == 9:
                assert_same_bits(results(module, x, hx), expected)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert hits == 30


def test_keyboard_interrupt_in_a_hook_leaves_the_module_usable():
    module, x = StackedLSTM(3, 5, 2), torch.randn(4, 2, 3)
    expected = module(x)[0]
    handle = module.weight_hh_l0.register_hook(lambda g: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module(x)[0].sum().backward()
    handle.remove()
    module.zero_grad()
    assert torch.equal(module(x)[0], expected)
    module(x)[0].sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_calls_from_torch_s_inter_op_pool():
    """TorchScript's fork runs tasks on threads that Python has never seen, several at once."""

    def one(x: torch.Tensor, state: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.stacked_lstm_ext.forward(
            x, None, state, state, weights, None, True, 2, False, 0, 0.0, "none", "cpu"
        )[0]

    def many(x: torch.Tensor, state: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        futures = [torch.jit.fork(one, x * i, state, weights) for i in range(6)]
        return torch.stack([torch.jit.wait(future) for future in futures])

    arguments = forward_arguments(Case(2, 3, 20, 4, 18), torch.float32)
    x, state, weights = arguments[0], arguments[2], arguments[4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(many)
        expected = torch.stack([one(x * i, state, weights) for i in range(6)])
        for _ in range(5):
            torch.testing.assert_close(scripted(x, state, weights), expected)
