"""A deep character model on real text, trained twice from one seed: with ``nn.LSTM``, and with ``StackedLSTM``.

    python examples/char_lm.py                    # on the source of Python's own standard library
    python examples/char_lm.py --text novel.txt   # on any text
    python examples/char_lm.py --quick            # within 45 seconds

The second model is the first with every ``nn.LSTM`` swapped by ``convert_lstm``. The two take turns on the same text,
so that their times compare; and they learn the same, step by step, but for rounding. The program ends with a sample of
what the second has learnt, and fails when the two loss curves part from the start.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from stacked_lstm_ext import convert_lstm

State = tuple[Tensor, Tensor]

# Rounding makes the two losses differ in their last digits, and training amplifies that without bound, as it would
# amplify a change of the last bit of any weight. A wrong gradient shows at once: the first steps are what is compared.
SAME_STEPS = 20
SAME_LOSS = 1e-5  # relative

TEMPERATURE = 0.6  # of the sample: below 1, the likely gets likelier


class CharModel(nn.Module):
    """Embedding, a deep LSTM, and a linear layer that predicts the next character."""

    def __init__(self, symbols: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers)
        self.head = nn.Linear(hidden, symbols)
        for name, parameter in self.lstm.named_parameters():
            if "weight" in name:  # signals keep their size through the layers, where torch's default shrinks them
                for gate in parameter.data.chunk(4):
                    nn.init.orthogonal_(gate)
            elif "bias_ih" in name:  # remember at first: gradients reach further back
                nn.init.ones_(parameter.data[hidden : 2 * hidden])

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        output, state = self.lstm(self.embedding(text), state)
        return self.head(output), state


def read_text(path: Path | None, limit: int) -> str:
    """The text to learn: a file, or the standard library's modules one after the other, up to `limit` characters."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8", errors="replace")
        if len(text) >= limit:
            break
    return text[:limit]


def chunks(codes: Tensor, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Inputs, targets (steps, batch) and whether the text starts anew; else a chunk goes on where the last ended."""
    lanes = codes[: (len(codes) - 1) // batch * batch + 1]
    inputs, targets = lanes[:-1].view(batch, -1).T, lanes[1:].view(batch, -1).T
    while True:
        for start in range(0, len(inputs) - steps + 1, steps):
            chunk = slice(start, start + steps)
            yield inputs[chunk], targets[chunk], start == 0


class Trainer:
    """A model with its optimiser and the state that it carries from chunk to chunk."""

    def __init__(self, model: CharModel, rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), rate)
        self.state: State | None = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor, anew: bool) -> None:
        """One update, timed from the forward pass to the changed weights."""
        started = time.perf_counter()
        logits, state = self.model(inputs, None if anew else self.state)
        self.state = (state[0].detach(), state[1].detach())
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for a GPU to finish
        self.seconds.append(time.perf_counter() - started)


@torch.inference_mode()
def sample(model: CharModel, symbols: str, prompt: str, length: int, device: torch.device) -> str:
    """`prompt`, continued character by character."""
    text = [symbols.index(character) for character in prompt if character in symbols] or [0]
    logits, state = model(torch.tensor(text, device=device)[:, None])
    for _ in range(length):
        drawn = torch.multinomial(torch.softmax(logits[-1, 0] / TEMPERATURE, 0), 1)
        text.append(int(drawn))
        logits, state = model(drawn[:, None], state)
    return "".join(symbols[code] for code in text)


def plot(stock: Trainer, ours: Trainer, path: Path) -> None:
    """Both loss curves, and how far apart they are."""
    figure, (curves, gap) = plt.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(7, 5), layout="constrained")
    curves.plot(stock.losses, color="#1d4ed8", linewidth=3, alpha=0.4, label="nn.LSTM")
    curves.plot(ours.losses, color="#c2410c", linewidth=1, label="StackedLSTM")
    curves.set_ylabel("loss, nats per character")
    curves.legend(frameon=False)
    gap.semilogy([max(abs(a - b), 1e-9) for a, b in zip(stock.losses, ours.losses)], color="0.4", linewidth=1)
    gap.set_ylabel("difference")
    gap.set_xlabel("step")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a deep character model with nn.LSTM and StackedLSTM side by side."
    )
    parser.add_argument("--text", type=Path, help="a text file (default: the Python standard library's source)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop training after so long")
    parser.add_argument("--rate", type=float, default=3e-3, help="Adam's learning rate")
    parser.add_argument("--characters", type=int, default=4_000_000, help="of the text, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--sample", type=int, default=600, help="characters to generate")
    parser.add_argument("--out", type=Path, default=Path("out", "char_lm"))
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps, within 45 seconds")
    if parser.parse_known_args()[0].quick:  # changes the defaults only: what is asked for beside it stands
        parser.set_defaults(hidden=128, batch=16, seq_len=32, steps=500, seconds=35, rate=5e-3, characters=1_000_000)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    device = torch.device(options.device)
    console = Console(highlight=False)
    text = read_text(options.text, options.characters)
    if len(text) <= options.batch * options.seq_len:
        sys.exit(f"error: the text has {len(text)} characters, and a batch takes {options.batch * options.seq_len}")
    symbols = "".join(sorted(set(text)))
    code = {symbol: number for number, symbol in enumerate(symbols)}
    codes = torch.tensor([code[character] for character in text], device=device)

    trainers = []
    for swap in (False, True):
        torch.manual_seed(options.seed)
        model = CharModel(len(symbols), options.hidden, options.layers).to(device)
        if swap:
            convert_lstm(model)  # in place
        trainers.append(Trainer(model, options.rate))
    stock, ours = trainers
    console.print(
        f"{len(text):,} characters, {len(symbols)} different ones; {options.layers} layers of {options.hidden} on the "
        f"{options.device}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    )
    columns = (TextColumn("loss {task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    end = time.perf_counter() + options.seconds
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=options.steps, loss="–")
        for number, chunk in zip(range(options.steps), chunks(codes, options.batch, options.seq_len)):
            for trainer in trainers if number % 2 else reversed(trainers):  # neither is always first
                trainer.step(*chunk)
            progress.update(task, advance=1, loss=f"{ours.losses[-1]:.3f}")
            if time.perf_counter() > end:
                break

    options.out.mkdir(parents=True, exist_ok=True)
    plot(stock, ours, options.out / "loss.png")
    console.rule("sample")
    console.print(sample(ours.model, symbols, options.prompt, options.sample, device), markup=False)
    console.rule()
    return report(stock, ours, options.out / "loss.png", console)


def report(stock: Trainer, ours: Trainer, picture: Path, console: Console) -> int:
    """Say how the two compare; 1 when their curves differ by more than rounding."""
    steps = len(ours.losses)
    gaps = [abs(a - b) / a for a, b in zip(stock.losses, ours.losses)]
    early = min(SAME_STEPS, steps)
    equal = max(gaps[:early]) <= SAME_LOSS
    times = [1e3 * statistics.median(trainer.seconds) for trainer in (stock, ours)]
    last = max(1, steps // 10)
    ends = [statistics.mean(trainer.losses[-last:]) for trainer in (stock, ours)]
    verdict = "equal to rounding" if equal else "NOT EQUAL"
    console.print(
        f"loss     from {ours.losses[0]:.3f} nats per character to {ends[0]:.3f} with nn.LSTM and {ends[1]:.3f} with "
        f"StackedLSTM, over the last {last} of {steps} steps\n"
        f"curves   {verdict}: {max(gaps[:early]):.1e} apart over the first {early} steps, {SAME_LOSS:.0e} allowed; "
        f"{max(gaps):.1e} over all, as training amplifies rounding\n"
        f"time     nn.LSTM {times[0]:.1f} ms a step, StackedLSTM {times[1]:.1f} ms, medians of interleaved steps: "
        f"{times[0] / times[1]:.2f} times as fast\n"
        f"picture  {picture}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
