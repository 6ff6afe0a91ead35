"""Recurrent layers and cells: hidden channels leave from all layers and directions at once."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from support.zoo.registry import IMAGE, awkward, conv
from support.zoo.streams import TOKENS, words


class Tagger(nn.Module):
    """Linear layer, recurrent layer, linear layer."""

    def __init__(self, rnn, out):
        super().__init__()
        self.inp, self.rnn, self.head = nn.Linear(6, 8), rnn, nn.Linear(out, 4)

    def forward(self, x):
        y, _ = self.rnn(torch.tanh(self.inp(x)))
        return self.head(y)


# The 8 inputs, and the hidden channels: every layer and direction has the same.
@awkward(TOKENS, removable=8 + 10)
def lstm():
    return Tagger(nn.LSTM(8, 10, batch_first=True), 10)


@awkward(TOKENS, removable=8 + 10)
def lstm_of_three_layers():
    return Tagger(nn.LSTM(8, 10, 3, batch_first=True, dropout=0.3), 10)


@awkward(TOKENS, removable=8 + 10)
def lstm_without_bias_sequence_first():
    return Tagger(nn.LSTM(8, 10, 2, bias=False), 10)


@awkward(TOKENS, removable=8 + 10)
def lstm_of_two_directions():
    return Tagger(nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True), 20)


@awkward(TOKENS, removable=8 + 10 + 4)  # cells, and what they are projected to
def lstm_with_projection():
    return Tagger(nn.LSTM(8, 10, 2, batch_first=True, proj_size=4), 4)


@awkward(TOKENS, removable=8 + 10 + 4)
def lstm_with_projection_of_two_directions():
    return Tagger(nn.LSTM(8, 10, batch_first=True, proj_size=4, bidirectional=True), 8)


@awkward(TOKENS, removable=8 + 10)
def gru_of_two_directions():
    return Tagger(nn.GRU(8, 10, 2, batch_first=True, bidirectional=True), 20)


@awkward(TOKENS, removable=8 + 10)
def plain_rnn_with_relu():
    return Tagger(nn.RNN(8, 10, 2, nonlinearity="relu", batch_first=True), 10)


@awkward(TOKENS, removable=8 + 10 + 10)  # what the layer reads, and what it is added to
def gru_beside_a_shortcut():
    class Residual(Tagger):
        def forward(self, x):
            x = torch.tanh(self.inp(x))
            y, _ = self.rnn(self.up(x))
            return self.head(y + self.skip(x))

    net = Residual(nn.GRU(10, 10, batch_first=True), 10)
    net.up, net.skip = nn.Linear(8, 10, bias=False), nn.Linear(8, 10)
    return net


# Input and output of the layer are one stream.
@awkward(TOKENS, removable=8)
def gru_in_a_residual_stream():
    class Residual(Tagger):
        def forward(self, x):
            x = torch.tanh(self.inp(x))
            return self.head(x + self.rnn(x)[0])

    return Residual(nn.GRU(8, 8, batch_first=True), 8)


@awkward(TOKENS, removable=8 + 10)  # the last state of all layers and directions, not the outputs
def last_state_of_every_layer():
    class Last(Tagger):
        def forward(self, x):
            _, (state, cell) = self.rnn(torch.tanh(self.inp(x)))
            both = torch.cat([state[-2], state[-1], cell[0]], dim=1)
            return self.head(both)

    return Last(nn.LSTM(8, 10, 2, batch_first=True, bidirectional=True), 30)


@awkward(TOKENS, removable=8 + 10)  # the states begin as zeros that the code makes
def first_state_of_zeros():
    class Zeros(Tagger):
        def __init__(self):
            super().__init__(nn.LSTM(8, 10, 2, batch_first=True), 10)
            self.hidden, self.layers = 10, 2

        def forward(self, x):
            state = torch.zeros(self.layers, x.size(0), self.hidden, dtype=x.dtype)
            y, _ = self.rnn(torch.tanh(self.inp(x)), (state, state.clone()))
            return self.head(y[:, -1, :])

    return Zeros()


@awkward(TOKENS, removable=8 + 10)  # the states begin as parameters
def first_state_is_learned():
    class Learned(Tagger):
        def __init__(self):
            super().__init__(nn.GRU(8, 10, 2, batch_first=True), 10)
            self.first = nn.Parameter(torch.randn(2, 1, 10))

        def forward(self, x):
            first = self.first.expand(-1, x.shape[0], -1).contiguous()
            return self.head(self.rnn(torch.tanh(self.inp(x)), first)[0])

    return Learned()


@awkward(TOKENS, removable=8 + 5 + 10)
def layers_of_several_widths():
    class Two(Tagger):
        def __init__(self):
            super().__init__(nn.LSTM(8, 5, batch_first=True), 10)
            self.second = nn.GRU(5, 10, batch_first=True)

        def forward(self, x):
            y, _ = self.rnn(torch.tanh(self.inp(x)))
            return self.head(self.second(y)[0])

    return Two()


def _sequences():
    return torch.randn(3, 5, 6), torch.tensor([5, 3, 2])


@awkward(_sequences, removable=8 + 10)
class PackedSequences(Tagger):
    def __init__(self):
        super().__init__(nn.LSTM(8, 10, batch_first=True, bidirectional=True), 20)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(torch.tanh(self.inp(x)), lengths, batch_first=True)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(y)


@awkward(_sequences, removable=8 + 10)
class PackedSequencesInAnyOrder(Tagger):
    def __init__(self):
        super().__init__(nn.GRU(8, 10, batch_first=True), 10)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            torch.tanh(self.inp(x)), lengths.flip(0), batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][-1])


@awkward(_sequences, removable=8 + 10)
class PackedSequencesWithTheirLengths(Tagger):
    """The lengths are put back in order: they are in memory that a kernel of torch wrote."""

    def __init__(self):
        super().__init__(nn.LSTM(8, 10, batch_first=True), 10)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            torch.tanh(self.inp(x)), lengths.flip(0), batch_first=True, enforce_sorted=False
        )
        y, found = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(y.sum(1) / found[:, None])


@awkward((3, 5, 6), removable=8 + 10)
class StateOfTheFirstVersions(Tagger):
    """``new`` takes sizes as ``new_empty`` does."""

    def __init__(self):
        super().__init__(nn.LSTM(8, 10, batch_first=True), 10)
        self.hidden = 10

    def forward(self, x):
        weight = next(self.parameters()).data
        state = (
            weight.new(1, x.size(0), self.hidden).zero_(),
            weight.new(torch.Size([1, x.size(0), self.hidden])).zero_(),
        )
        return self.head(self.rnn(torch.tanh(self.inp(x)), state)[0])


class Cell(nn.Module):
    """A cell in a loop over the steps."""

    def __init__(self, cell):
        super().__init__()
        self.inp, self.cell, self.head = nn.Linear(6, 8), cell, nn.Linear(10, 4)

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        state = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@awkward(TOKENS, removable=8 + 10)
def gru_cell_in_a_loop():
    return Cell(nn.GRUCell(8, 10))


@awkward(TOKENS, removable=8 + 10)
def rnn_cell_in_a_loop():
    return Cell(nn.RNNCell(8, 10))


@awkward(TOKENS, removable=8 + 10 + 7)  # two cells, one above the other
class LstmCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head = nn.Linear(6, 8), nn.Linear(7, 4)
        self.low, self.high = nn.LSTMCell(8, 10), nn.LSTMCell(10, 7)

    def forward(self, x):
        x, outs, low, high = torch.tanh(self.inp(x)), [], None, None
        for step in range(x.shape[1]):
            low = self.low(x[:, step], low)
            high = self.high(low[0], high)
            outs.append(high[0])
        return self.head(torch.stack(outs, dim=1))


@awkward(TOKENS, removable=8 + 10)  # gates by chunk, as a user writes them
class OwnLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = 10
        self.inp, self.head = nn.Linear(6, 8), nn.Linear(10, 4)
        self.gates, self.back = nn.Linear(8, 40), nn.Linear(10, 40, bias=False)

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        h = c = torch.zeros(x.size(0), self.hidden, dtype=x.dtype)
        for step in range(x.size(1)):
            i, f, g, o = (self.gates(x[:, step]) + self.back(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


@awkward(IMAGE, removable=6 + 5)  # gates are maps; frames are the image, moved
class ConvLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gates, self.head = conv(3, 6), conv(6 + 5, 20), conv(5, 2)
        self.hidden = 5

    def forward(self, image):
        b, _, rows, columns = image.shape
        h = c = image.new_zeros(b, self.hidden, rows, columns)
        for shift in range(3):
            x = F.relu(self.stem(image.roll(shift, 3)))
            i, f, o, g = torch.split(self.gates(torch.cat([x, h], dim=1)), self.hidden, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


# Words, hidden state and classifier share one width, because table and classifier are one.
@awkward(words, removable=10)
class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 10), nn.Linear(10, 11)
        self.rnn, self.drop = nn.LSTM(10, 10, 2, batch_first=True, dropout=0.2), nn.Dropout(0.2)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        y, _ = self.rnn(self.drop(self.words(tokens)))
        return self.head(self.drop(y)).log_softmax(-1)


@awkward(words, removable=10 + 14)  # a projection frees the hidden state
class LanguageModelWithProjection(LanguageModel):
    def __init__(self):
        super().__init__()
        self.rnn, self.down = nn.LSTM(10, 14, batch_first=True), nn.Linear(14, 10)

    def forward(self, tokens):
        return self.head(self.down(self.rnn(self.words(tokens))[0]))


@awkward(words, removable=8 + 10)
class GruTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8, padding_idx=0), nn.Linear(20, 4)
        self.rnn = nn.GRU(8, 10, batch_first=True, bidirectional=True)

    def forward(self, tokens):
        return self.head(self.rnn(self.words(tokens))[0])


# Words of both languages, the state that the encoder hands over, the hidden layer of the scores.
@awkward(lambda: words() + words(9, length=4), removable=6 + 7 + 10 + 5)
class AdditiveAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 6), nn.Embedding(9, 7)
        self.encoder, self.cell = nn.GRU(6, 10, batch_first=True), nn.GRUCell(7 + 10, 10)
        self.keys, self.query, self.score = nn.Linear(10, 5), nn.Linear(10, 5), nn.Linear(5, 1)
        self.head = nn.Linear(20, 9)

    def forward(self, source, target):
        memory, state = self.encoder(self.source(source))
        state, outs = state.squeeze(0), []
        for word in self.target(target).unbind(1):
            scores = self.score(torch.tanh(self.keys(memory) + self.query(state).unsqueeze(1)))
            context = torch.bmm(scores.softmax(1).transpose(1, 2), memory).squeeze(1)
            state = self.cell(torch.cat([word, context], dim=1), state)
            outs.append(self.head(torch.cat([state, context], dim=1)))
        return torch.stack(outs, dim=1)


# Scores are products of both states, so both lose the same channels; so do their outputs.
@awkward(lambda: words() + words(9, length=4), removable=6 + 7 + 10 + 8)
class DotProductAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(11, 6), nn.Embedding(9, 7)
        self.encoder = nn.LSTM(6, 10, batch_first=True)
        self.decoder = nn.LSTM(7, 10, batch_first=True)
        self.mix, self.head = nn.Linear(20, 8), nn.Linear(8, 9)

    def forward(self, source, target):
        memory, state = self.encoder(self.source(source))
        y, _ = self.decoder(self.target(target), state)
        context = torch.bmm(y, memory.transpose(1, 2)).softmax(-1) @ memory
        return self.head(torch.tanh(self.mix(torch.cat([y, context], dim=-1))))


# Columns of the map are steps; the height of two is folded into the inputs, with its channels.
@awkward(IMAGE, removable=6 + 8 + 10)
class Crnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = conv(3, 6), conv(6, 8), nn.BatchNorm2d(8)
        self.rnn, self.head = nn.LSTM(16, 10, 2, bidirectional=True), nn.Linear(20, 5)

    def forward(self, image):
        x = F.max_pool2d(F.relu(self.a(image)), 2)
        x = F.max_pool2d(F.relu(self.norm(self.b(x))), (2, 1))
        b, c, h, w = x.size()
        x = x.reshape(b, c * h, w).permute(2, 0, 1)
        y, _ = self.rnn(x)
        return self.head(y).log_softmax(2)


@awkward(TOKENS, removable=8 + 10 + 7)  # a stack of layers with norms between them
def norms_between_layers():
    class Norms(Tagger):
        def __init__(self):
            super().__init__(nn.GRU(8, 10, batch_first=True), 7)
            self.norm, self.second = nn.LayerNorm(10), nn.RNN(10, 7, batch_first=True)

        def forward(self, x):
            y, _ = self.rnn(torch.tanh(self.inp(x)))
            y, _ = self.second(self.norm(y))
            return self.head(F.relu(y))

    return Norms()


# The minimal gated unit: update gate and candidate, tied by products with the state.
@awkward(TOKENS, removable=8 + 10)
class LightGru(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.head, self.both = nn.Linear(6, 8), nn.Linear(10, 4), nn.Linear(8, 20)
        self.back = nn.Parameter(torch.randn(20, 10) * 0.3)

    def forward(self, x):
        pre = self.both(torch.tanh(self.inp(x)))
        h = pre.new_zeros(pre.shape[0], pre.shape[-1] // 2)
        for step in range(pre.shape[1]):
            update, candidate = (pre[:, step] + F.linear(h, self.back)).chunk(2, dim=-1)
            update = torch.sigmoid(update)
            h = update * h + (1 - update) * torch.tanh(candidate)
        return self.head(h)


@awkward((3, 5, 6), removable=8 + 10)
class OneSizeOfTwoStates(nn.Module):
    """An attribute and one line of code size the states of both cells: one width."""

    def __init__(self):
        super().__init__()
        self.hidden = 10
        self.inp, self.head = nn.Linear(6, 8), nn.Linear(10, 4)
        self.lower, self.upper = nn.GRUCell(8, 10), nn.GRUCell(10, 10)

    def forward(self, x):
        x = torch.tanh(self.inp(x))
        low, high = (torch.zeros(len(x), n).to(x) for n in (self.hidden, self.hidden))
        for step in x.unbind(1):
            low = self.lower(step, low)
            high = self.upper(low, high)
        return self.head(high)
