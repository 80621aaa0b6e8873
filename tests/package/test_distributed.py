"""Two processes on gloo, DistributedDataParallel and FSDP2, against stock in one process on the whole batch."""

import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from stacked_lstm_ext import StackedLSTM

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch was built without gloo"
)
STEPS, WORLD = 4, 2


class Model(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.inputs = nn.Linear(3, 6)
        self.lstm = cls(6, 8, 3, bidirectional=True, proj_size=4)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(self.inputs(x))[0])


def fresh(cls):
    torch.manual_seed(0)
    return Model(cls).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 5, 4, 3, dtype=torch.float64, generator=generator)


def train(model, batches, finish=lambda: None):
    """The loss is a mean over the batch, so the mean of two halves' gradients is that of the whole."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        finish()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wrap_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def wrap_fsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.lstm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap_fsdp_mixed(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float64, output_dtype=torch.float64)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


WRAPS = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp, "fsdp2 in float32": wrap_fsdp_mixed}


def worker(rank, port, queue):
    """Trains the model once with each wrap and sends back (rank, {kind: (losses, weights)})."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
        found = {}
        for kind, wrap in WRAPS.items():
            model = wrap(fresh(StackedLSTM))
            losses = train(model, data().chunk(WORLD, dim=2)[rank])
            weights = {}
            for name, p in model.named_parameters():
                full = p.full_tensor() if hasattr(p, "full_tensor") else p
                weights[name.removeprefix("module.")] = full.detach().numpy().copy()
            found[kind] = losses, weights
        queue.put((rank, found))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, traceback.format_exc()))
        raise


@pytest.fixture(scope="module")
def found():
    """What the two processes found, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, queue), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        got = dict(queue.get(timeout=240) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            if process.is_alive():
                process.kill()
    for rank, result in got.items():
        assert isinstance(result, dict), f"process {rank} failed:\n{result}"
    return got


@pytest.mark.parametrize("kind", WRAPS)
def test_two_processes_match_one(kind, found):
    reference = fresh(nn.LSTM)
    losses = train(reference, data())
    # Adam divides by the gradient's size, so a rounding of a tiny one shows.
    tol = 1e-3 if "float32" in kind else 1e-9
    mean = [sum(both) / WORLD for both in zip(*(found[rank][kind][0] for rank in range(WORLD)), strict=True)]
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(losses), rtol=tol, atol=tol)
    for rank in range(WORLD):
        weights = found[rank][kind][1]
        assert weights.keys() == dict(reference.named_parameters()).keys()
        for name, p in reference.named_parameters():
            torch.testing.assert_close(
                torch.from_numpy(weights[name]), p.detach(), rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
            )
