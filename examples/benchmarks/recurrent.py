"""Recurrent models as a user would write them: their channels are found without any help."""

from __future__ import annotations

import torch
from suites import Case
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, TAGS, CHARACTERS = 101, 9, 37


class LanguageModel(nn.Module):
    """Two LSTM layers; the embedding table is the output layer as well."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.lstm = nn.LSTM(width, 128, num_layers=2, batch_first=True, dropout=0.1)
        self.project = nn.Linear(128, width)
        self.out = nn.Linear(width, WORDS)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        return self.out(torch.tanh(self.project(hidden)))


class Tagger(nn.Module):
    """A bidirectional GRU over words; one tag for each."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.gru = nn.GRU(width, 64, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(128, 64)
        self.tags = nn.Linear(64, TAGS)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(tokens))
        return self.tags(F.relu(self.hidden(states)))


class Attention(nn.Module):
    """Additive attention (Bahdanau et al., 2015)."""

    def __init__(self, query: int, memory: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(query, width)
        self.memory = nn.Linear(memory, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        energy = torch.tanh(self.query(query).unsqueeze(1) + self.memory(memory))
        weights = self.score(energy).squeeze(2).softmax(1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)


class Translator(nn.Module):
    """Sequence to sequence: a bidirectional encoder, a decoder cell that attends to it."""

    def __init__(self, width: int = 48, hidden: int = 64) -> None:
        super().__init__()
        self.source = nn.Embedding(WORDS, width)
        self.target = nn.Embedding(WORDS, width)
        self.encoder = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.attention = Attention(hidden, 2 * hidden, 64)
        self.cell = nn.GRUCell(width + 2 * hidden, hidden)
        self.out = nn.Linear(3 * hidden, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encoder(self.source(source))
        state = torch.tanh(self.bridge(torch.cat([last[0], last[1]], dim=1)))
        words = []
        for word in self.target(target).unbind(1):
            context = self.attention(state, memory)
            state = self.cell(torch.cat([word, context], dim=1), state)
            words.append(self.out(torch.cat([state, context], dim=1)))
        return torch.stack(words, dim=1)


class CRNN(nn.Module):
    """Text in images (Shi et al., 2015): convolutions, then LSTMs along the width."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [1, 32, 64, 128, 128]
        for before, after, pool in zip(widths, widths[1:], [(2, 2), (2, 2), (2, 1), (2, 1)]):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(pool),
            ]
        self.features = nn.Sequential(*layers)
        self.squeeze = nn.Linear(128 * 2, 64)
        self.lstm = nn.LSTM(64, 96, num_layers=2, bidirectional=True)
        self.characters = nn.Linear(192, CHARACTERS)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.features(image)  # batch, channels, height, width
        columns = maps.permute(3, 0, 1, 2).flatten(2)
        states, _ = self.lstm(self.squeeze(columns))
        return self.characters(states).log_softmax(2)


def _tokens(length: int, batch: int) -> Tensor:
    return torch.randint(WORDS, (batch, length))


def suite() -> list[Case]:
    """All cases."""
    return [
        Case("LSTM language model", "language model", LanguageModel,
             lambda batch: _tokens(12, batch), WORDS, size="12", batch=2),
        Case("bidirectional GRU tagger", "tagger", Tagger,
             lambda batch: _tokens(12, batch), TAGS, size="12", batch=2),
        Case("seq2seq with attention", "seq2seq", Translator,
             lambda batch: (_tokens(9, batch), _tokens(6, batch)), WORDS, size="9, 6", batch=2),
        Case("CRNN", "text recognition", CRNN,
             lambda batch: torch.randn(batch, 1, 32, 48), CHARACTERS, size="32x48", batch=2),
    ]  # fmt: skip
