"""The smallest use there is: swap every ``nn.LSTM`` inside a model, and go on as before."""

import torch
from torch import Tensor, nn

from stacked_lstm_ext import StackedLSTM, convert_lstm


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(32, 64, num_layers=6)
        self.head = nn.Linear(64, 2)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.encoder(sequences)[0][-1])


model = Classifier()
optimizer = torch.optim.Adam(model.parameters())  # made before the swap: the parameters stay the same objects
sequences, classes = torch.randn(100, 8, 32), torch.randint(2, (8,))

before = model(sequences)
convert_lstm(model)
after = model(sequences)

nn.functional.cross_entropy(after, classes).backward()
optimizer.step()

assert isinstance(model.encoder, StackedLSTM)
print(model)
print(model.encoder.plan(batch_size=8, seq_len=100))
print(f"largest difference from nn.LSTM: {(after - before).abs().max():.1e}")
