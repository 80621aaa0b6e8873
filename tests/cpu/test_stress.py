"""Many modules in many Python threads at once, their weights changed between calls, against the same done alone.

What could go wrong is shared: the cache of packed weights, the workspaces that threads keep, torch's pool.
"""

import copy
import random
import sys
import threading

import pytest
import torch

from stacked_lstm_ext import StackedLSTM

THREADS = 6
ROUNDS = 12


def sgd(module, x, hx):
    """One training step by hand: results, gradients, and an update in place."""
    output, (h, c) = module(x, hx)
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(output.sum() + h.sum() + c.square().sum(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=1e-3)
    return [output.detach(), h.detach(), c.detach(), *gradients]


@torch.no_grad()
def infer(module, x, hx):
    output, (h, c) = module(x, hx)
    return [output, h, c]


@torch.no_grad()
def stream(module, x, hx):
    outputs = []
    for row in x:
        output, hx = module.step(row, hx)
        outputs.append(output)
    return [*outputs, *hx]


# Changes of the weights, each of a kind that a cache has to notice in its own way.


@torch.no_grad()
def scale(module, draw):
    for parameter in module.parameters():
        parameter.mul_(0.9 + 0.2 * draw.random())


@torch.no_grad()
def change_one_element(module, draw):
    weight = draw.choice(list(module.parameters()))
    weight.view(-1)[draw.randrange(weight.numel())] += 1


def write_data(module, draw):
    for parameter in module.parameters():
        parameter.data.mul_(0.9 + 0.2 * draw.random())


def swap_data(module, draw):
    for parameter in module.parameters():
        parameter.data = parameter.data.clone().mul_(0.9 + 0.2 * draw.random())


def load(module, draw):
    module.load_state_dict({name: value * (0.9 + 0.2 * draw.random()) for name, value in module.state_dict().items()})


def replace(module, draw):
    name = draw.choice(["weight_ih_l0", "weight_hh_l0"])
    setattr(module, name, torch.nn.Parameter(getattr(module, name).detach() * 0.9))


def nothing(module, draw):
    pass


CALLS = [infer, infer, stream, sgd]
CHANGES = [scale, change_one_element, write_data, swap_data, load, replace, nothing, nothing, nothing]
STACKS = [
    {"input_size": 8, "hidden_size": 16, "num_layers": 3},
    {"input_size": 16, "hidden_size": 144, "num_layers": 2},  # wide enough to be shared out
    {"input_size": 5, "hidden_size": 21, "num_layers": 2, "proj_size": 7},
    {"input_size": 8, "hidden_size": 16, "num_layers": 3, "bf16_weights": True, "recompute": True},
    {"input_size": 6, "hidden_size": 20, "num_layers": 2, "dtype": torch.float64},
    {"input_size": 6, "hidden_size": 20, "num_layers": 2, "dtype": torch.bfloat16},
]


def life(seed, keep=lambda module: module):
    """Calls and changes of some modules, drawn from `seed`: all results, in order."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    modules = [keep(copy.deepcopy(TEMPLATES[n])) for n in (seed % len(STACKS), draw.randrange(len(STACKS)))]
    seen = []
    for _ in range(ROUNDS):
        module = draw.choice(modules)
        batch, dtype = draw.choice([1, 1, 3, 8]), module.weight_ih_l0.dtype
        x = torch.randn(4, batch, module.input_size, generator=generator).to(dtype)
        hx = tuple(
            torch.randn(module.num_layers, batch, width, generator=generator).to(dtype)
            for width in (module.proj_size or module.hidden_size, module.hidden_size)
        )
        call = draw.choice(CALLS)
        for _ in range(draw.choice([1, 2, 3])):  # packed for the call, for keeps, and kept
            seen += call(module, x, hx)
        draw.choice(CHANGES)(module, draw)
        if draw.random() < 0.1:  # a module dies, and another may get its addresses
            modules[modules.index(module)] = keep(copy.deepcopy(TEMPLATES[draw.randrange(len(STACKS))]))
    return seen


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    TEMPLATES = [StackedLSTM(**arguments) for arguments in STACKS]


def side_by_side(jobs):
    """Runs all jobs at once, with the GIL handed over often; their results, in order."""
    found, errors, start = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def run(n):
        try:
            start.wait(60)
            found[n] = jobs[n]()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive(), "a call did not come back"
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]
    return found


def assert_same(found, alone, who):
    assert len(found) == len(alone)
    for n, (one, other) in enumerate(zip(found, alone, strict=True)):
        assert torch.equal(one, other), f"{who}: result {n} of {len(alone)} differs by {(one - other).abs().max():.3g}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first_seed", range(0, 4 * THREADS, THREADS))
def test_modules_of_their_own(first_seed, threads):
    torch.set_num_threads(threads)
    seeds = range(first_seed, first_seed + THREADS)
    alone = [life(seed) for seed in seeds]
    for seed, found, expected in zip(seeds, side_by_side([lambda s=seed: life(s) for seed in seeds]), alone, strict=True):
        assert_same(found, expected, f"seed {seed}")


@pytest.mark.parametrize("call", [infer, stream])
@pytest.mark.parametrize("stack", range(len(STACKS)))
def test_modules_that_all_threads_share(stack, call):
    """All call it at once; then one of them changes it, the others wait; and again."""
    torch.set_num_threads(2)
    shared, alone = copy.deepcopy(TEMPLATES[stack]), copy.deepcopy(TEMPLATES[stack])
    dtype, generator = shared.weight_ih_l0.dtype, torch.Generator().manual_seed(stack)
    widths = shared.proj_size or shared.hidden_size, shared.hidden_size
    inputs = [torch.randn(3, 1 + n % 2 * 7, shared.input_size, generator=generator).to(dtype) for n in range(THREADS)]
    states = [tuple(torch.zeros(shared.num_layers, x.size(1), w, dtype=dtype) for w in widths) for x in inputs]
    changes = [scale, change_one_element, write_data, swap_data, load, replace]
    meet = threading.Barrier(THREADS)

    def job(n):
        def run():
            seen = []
            for turn, change in enumerate(changes):
                for _ in range(3):
                    seen += call(shared, inputs[n], states[n])
                meet.wait(60)
                if turn % THREADS == n:
                    change(shared, random.Random(turn))
                meet.wait(60)
            return seen

        return run

    found = side_by_side([job(n) for n in range(THREADS)])
    expected = [[] for _ in range(THREADS)]
    for turn, change in enumerate(changes):
        for n in range(THREADS):
            for _ in range(3):
                expected[n] += call(alone, inputs[n], states[n])
        change(alone, random.Random(turn))
    for n in range(THREADS):
        for one, other in zip(found[n], expected[n], strict=True):
            # Whether a step comes upon packed weights depends on who was first: the same to rounding.
            torch.testing.assert_close(one, other, rtol=0, atol=16 * torch.finfo(dtype).eps if call is stream else 0)
