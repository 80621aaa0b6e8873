"""A model trained for some steps with each: the same curve, the same weights, to rounding."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from stacked_lstm_ext import StackedLSTM


class Echo(nn.Module):
    """Says at every step which symbol it saw two steps ago."""

    def __init__(self, lstm, symbols=6):
        super().__init__()
        self.embed = nn.Embedding(symbols, 8)
        self.lstm = lstm
        self.head = nn.Linear((lstm.proj_size or lstm.hidden_size) * (2 if lstm.bidirectional else 1), symbols)

    def forward(self, tokens, lengths=None):
        x = self.embed(tokens)
        if lengths is None:
            return self.head(self.lstm(x)[0])
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.lstm(packed)[0], total_length=tokens.size(0))[0])


@functools.cache
def stock(name, steps):
    optimizer, options = next(row[1:] for row in RUNS if row[0] == name)
    return train(nn.LSTM, steps, optimizer, torch.float64, **options)


def train(cls, steps, optimizer, dtype, packed=False, clip=None, **options):
    torch.manual_seed(0)
    model = Echo(cls(8, 16, 3, **options)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (steps, 14, 5), generator=generator)
    lengths = torch.tensor([14, 9, 12, 3, 14]) if packed else None
    chosen, curve = optimizer(model.parameters()), []
    for batch in tokens:
        logits = model(batch, lengths)
        targets = batch.roll(2, 0)
        if packed:
            keep = torch.arange(14)[:, None] < lengths
            logits, targets = logits[keep], targets[keep]
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        chosen.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        chosen.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64), {n: p.detach() for n, p in model.named_parameters()}


RUNS = [
    ("Adam", lambda p: torch.optim.Adam(p, lr=0.01), {}),
    ("AdamW, fused", lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), {"bidirectional": True}),
    ("SGD with momentum, clipped", lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), {"clip": 1.0, "proj_size": 7}),
    ("RMSprop, packed", lambda p: torch.optim.RMSprop(p, lr=0.003), {"packed": True}),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["full", "recompute"])
@pytest.mark.parametrize("name, optimizer, options", RUNS, ids=[row[0] for row in RUNS])
def test_twenty_steps_in_float64_give_stock_s_curve_and_weights(name, optimizer, options, recompute):
    steps = 20
    expected, weights = stock(name, steps)
    curve, got = train(functools.partial(StackedLSTM, recompute=recompute), steps, optimizer, torch.float64, **options)
    # A step may double an earlier error at the worst; 20 doublings of a rounding still lie below 1e-9.
    tol = 2**steps * torch.finfo(torch.float64).eps
    torch.testing.assert_close(curve, expected, rtol=tol, atol=tol)
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=tol, atol=tol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "dtype, tol", [(torch.float32, 2**10 * 2**-23), (torch.bfloat16, 2**3 * 2**-7)], ids=["float32", "bfloat16"]
)
def test_ten_steps_in_narrower_dtypes_stay_near_float64(dtype, tol):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.003)

    expected, _ = train(nn.LSTM, 10, adam, torch.float64)
    curve, _ = train(StackedLSTM, 10, adam, dtype)
    torch.testing.assert_close(curve, expected, rtol=tol, atol=tol)


def test_it_learns():
    """With dropout, in float32: the loss falls well below chance, ln 6."""
    torch.set_num_threads(1)
    curve, _ = train(StackedLSTM, 200, lambda p: torch.optim.Adam(p, lr=0.02), torch.float32, dropout=0.1)
    assert curve[:5].mean() > 1.6 and curve[-10:].mean() < 1.0, curve[-10:]


def test_truncated_backpropagation_carries_states_over():
    curves = []
    for cls in (nn.LSTM, StackedLSTM):
        torch.manual_seed(0)
        lstm = cls(4, 8, 2, dtype=torch.float64)
        optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
        x = torch.randn(40, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        hx, curve = None, []
        for chunk in x.split(8):
            output, hx = lstm(chunk, hx)
            loss = (output[..., :4] - chunk).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hx = tuple(s.detach() for s in hx)
            curve.append(loss.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    torch.testing.assert_close(*curves)
