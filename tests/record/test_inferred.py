"""Example inputs that nobody gave: ids, where the forward names them."""

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import InputError, TraceError
from graphprune.measurement import measure


class Pair(nn.Module):
    """An encoder and a decoder; one of them may read a value."""

    def __init__(self, reads=False):
        super().__init__()
        self.reads = reads
        self.embed, self.hidden, self.out = nn.Embedding(30, 8), nn.Linear(8, 12), nn.Linear(12, 30)

    def forward(self, input_ids, mask=None, decoder_input_ids=None):
        if decoder_input_ids is None:
            raise ValueError("the decoder needs ids as well")
        state = self.embed(input_ids).mean(1, keepdim=True)
        if self.reads and bool(decoder_input_ids.min() < 0):
            state = -state
        return self.out(self.hidden(self.embed(decoder_input_ids) + state).tanh())


@pytest.mark.parametrize("reads", [False, True])
def test_ids_of_encoder_and_decoder(reads):
    model = Pair(reads)
    graph = graphprune.trace(model)
    assert {*graph.call.kwargs} == {"input_ids", "decoder_input_ids"}
    small = graphprune.rebuild(model, 0.5)
    assert small.hidden.out_features == 6
    assert graphprune.verify(model, small).verdict == "equal"
    assert measure(model, latency=False).macs == 16 * (8 * 12 + 12 * 30)


class Scores(Pair):
    def forward(self, scores, input_ids):
        return self.out(self.hidden(self.embed(input_ids)) * scores)


def test_what_was_tried_is_told():
    with pytest.raises(InputError, match=r"could not infer.*input_ids=int64\[1, 16\]"):
        graphprune.trace(Scores())


class TakesImages(nn.Module):
    """A detector takes a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        if not isinstance(images, list):
            raise ValueError("a list of images is expected")
        return self.head(self.conv(torch.stack(images)))


def test_one_image_for_a_model_that_takes_a_list():
    image = torch.zeros(3, 8, 8)
    for function in (graphprune.trace, graphprune.measure):
        with pytest.raises(TraceError, match=r"runs on a list .* pass example_inputs=\[image\]"):
            function(TakesImages(), image)
        function(TakesImages(), [image])
