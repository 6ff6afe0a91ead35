"""Ids that modules, losses and configs remember, and ids as a user may give them."""

import numpy as np
import pytest
import torch
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.plan.plan import Plan

SIZE = 40
IDS = [3, 5, 21, 30]


def tokens(*shape):
    return torch.randint(SIZE, shape, generator=torch.Generator().manual_seed(3))


class Language(nn.Module):
    """A table, an output layer, and whatever else it remembers."""

    def __init__(self, **more):
        super().__init__()
        self.embed, self.head = nn.Embedding(SIZE, 8), nn.Linear(8, SIZE)
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, tokens):
        return self.head(self.embed(tokens).cumsum(1))


def trimmed(model, ids=IDS):
    with untouched(model):
        small = graphprune.trim_vocabulary(model, ids, tokens(2, 5))
        assert graphprune.verify(model, small, tokens(2, 5)).verdict == "equal"
    (vocabulary,) = small.graphprune_plan.vocabularies
    return small, vocabulary


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_a_loss_ignores_the_same_targets(kind):
    model = Language(loss=kind(ignore_index=9), plain=kind())
    small, vocabulary = trimmed(model)
    assert vocabulary.kept == (3, 5, 9, 21, 30)
    assert (small.loss.ignore_index, small.plain.ignore_index) == (2, -100)
    assert model.loss.ignore_index == 9
    targets = torch.tensor([3, 9, 30])
    logits = torch.randn(3, SIZE).log_softmax(-1)
    kept = logits[:, list(vocabulary.kept)]
    wanted = nn.functional.nll_loss(kept, torch.tensor([0, 2, 4]), ignore_index=2)
    assert torch.equal(nn.NLLLoss(ignore_index=2)(kept, vocabulary.to_new(targets)), wanted)


class Encoder(Language):
    """Its loss is about three classes, not about ids."""

    def __init__(self):
        super().__init__(loss=nn.CrossEntropyLoss(ignore_index=2))
        self.head = nn.Linear(8, 3)


def test_a_loss_without_logits_of_ids_stays():
    small, vocabulary = trimmed(Encoder())
    assert small.loss.ignore_index == 2
    assert vocabulary.kept == tuple(IDS)
    assert "the old ones" in str(small.graphprune_plan)


def test_training_with_labels_of_which_some_left():
    small, vocabulary = trimmed(Language())
    labels = vocabulary.to_new(torch.tensor([[3, 4, -100, 30]]))
    assert labels.tolist() == [[0, -1, -100, 3]]
    labels = labels.masked_fill(labels < 0, -100)
    logits = small(vocabulary.to_new(torch.tensor([[3, 3, 5, 5]])))
    nn.functional.cross_entropy(logits[0], labels[0]).backward()
    assert small.head.weight.grad.isfinite().all()


class Generation:
    """A config of one's own."""

    def __init__(self, **fields):
        vars(self).update(fields)

    def to_dict(self):
        return dict(vars(self))


def test_fields_that_hold_ids_follow():
    fields = {
        "sequence_bias": [[[3], 5.0], [[21, 30], -9.0], [[3, 4], 1.0]],
        "by_tuple": {},
        "lang_to_id": {"en": 9, "de": 10},
        "label_to_id": {"no": 0, "yes": 1},
        "force_words_ids": [[30, 12]],
        "bad_words_ids": [[5], [6]],
        "speed_to_id": {"slow": 1.5},
    }
    config = Generation(**fields)
    small, vocabulary = trimmed(Language(generation=config))
    assert vocabulary.kept == (3, 5, 9, 10, 12, 21, 30)
    told = small.generation
    assert told.sequence_bias == [[[0], 5.0], [[5, 6], -9.0]]
    assert told.lang_to_id == {"en": 2, "de": 3}
    assert told.label_to_id == {"no": 0, "yes": 1}
    assert told.force_words_ids == [[6, 4]]
    assert told.bad_words_ids == [[1]]
    assert told.speed_to_id == {"slow": 1.5}
    assert config.to_dict() == fields
    again, _ = trimmed(Language(generation=Generation(sequence_bias={(3,): 2.0, (3, 4): 1.0})))
    assert again.generation.sequence_bias == {(0,): 2.0}


def test_lists_of_ids_in_modules_follow():
    small, vocabulary = trimmed(Language(eos_token_ids=[30, 31], task_to_id={"a": 12, "b": 11}))
    assert vocabulary.kept == (3, 5, 11, 12, 21, 30, 31)
    assert small.eos_token_ids == [5, 6]
    assert small.task_to_id == {"a": 3, "b": 2}


class Sees(Language):
    """Its code reads an attribute, so that this follows."""

    def forward(self, tokens):
        return super().forward(tokens) * tokens.ne(self.pad)[..., None]


def test_attributes_that_may_be_ids_are_told():
    small, _ = trimmed(Language(bos=30, sep=7, mask=3, width=30))
    assert small.bos == 30
    notes = " ".join(small.graphprune_plan.notes)
    assert "bos (30), sep (7), mask (3)" in notes
    small, _ = trimmed(Sees(pad=30))
    assert small.pad == 3
    assert not small.graphprune_plan.notes


def test_ids_in_lists_and_small_types():
    _, vocabulary = trimmed(Language())
    assert vocabulary.to_new([[3, 4], [30, -7]]).tolist() == [[0, -1], [3, -7]]
    assert vocabulary.to_new([]).tolist() == []
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        new = vocabulary.to_new(torch.tensor([3, 4, 30], dtype=kind))
        assert new.tolist() == [0, -1, 3]
        assert new.dtype == (torch.int64 if kind is torch.uint8 else kind)
    for wrong in ("abc", torch.rand(2), [1.5], None, torch.tensor([True])):
        with pytest.raises(InputError, match="ids must be whole numbers"):
            vocabulary.to_new(wrong)


def test_inputs_of_a_type_without_negative_numbers():
    net = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 300))
    inputs = torch.tensor([[3, 200, 7]], dtype=torch.int32)
    small = graphprune.trim_vocabulary(net, range(7, 300), inputs)
    assert graphprune.verify(net, small, inputs).verdict == "equal"


@pytest.mark.parametrize("ids", [torch.tensor(3), np.array(3), 5, None])
def test_one_number_is_no_list_of_ids(ids):
    with pytest.raises(InputError, match="must be the ids that stay"):
        graphprune.trim_vocabulary(Language(), ids, tokens(2, 5))


def test_no_tokenizer():
    with pytest.raises(InputError, match="expected a tokenizer, anything with encode, got 'abc'"):
        graphprune.trim_vocabulary(Language(), IDS, tokens(2, 5), tokenizer="abc")
    small, _ = trimmed(Language())
    with pytest.raises(InputError, match=r"with encode and decode, got 5 \(int\)"):
        graphprune.MappedTokenizer(5, small)


class Tokens:
    """A tokenizer of the user's own that says how many ids it has."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self):
        return {str(number): number for number in range(self.size)}

    def encode(self, text):
        return list(map(int, text.split()))

    def decode(self, ids):
        return " ".join(map(str, ids))

    def __call__(self, texts, kind=list):
        found = [self.encode(text) for text in texts]
        return {"input_ids": kind(found), "labels": kind(found), "length": [len(f) for f in found]}


def test_what_else_a_tokenizer_makes_of_texts():
    small, _ = trimmed(Language())
    mapped = graphprune.MappedTokenizer(Tokens(SIZE), small)
    wanted = [[0, 1], [3, 2]]
    for kind in (list, np.array, torch.tensor):
        made = mapped(["3 5", "30 21"], kind=kind)
        for key in ("input_ids", "labels"):
            assert type(made[key]) is type(kind([1]))
            assert np.asarray(made[key]).tolist() == wanted
        assert made["length"] == [2, 2]
    frozen = np.array([3, 5])
    frozen.flags.writeable = False
    assert mapped._new(frozen).tolist() == [0, 1]
    assert mapped.decode(np.array([0, 3])) == "3 30"
    with pytest.raises(InputError, match="the ids of one text"):
        mapped.decode(torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match=r"made id 77 .* 0 to 39: it is larger than the table"):
        mapped.encode("3 77")
    with pytest.raises(InputError, match=r"made id 77"):
        mapped(["3 77"], kind=torch.tensor)


def test_an_unknown_token_must_be_one_that_stays():
    small, _ = trimmed(Language())
    for wrong in (9999, 4, True, "a"):
        with pytest.raises(InputError, match="none of the 4 ids that stay"):
            graphprune.MappedTokenizer(Tokens(SIZE), small, unknown=wrong)
    mapped = graphprune.MappedTokenizer(Tokens(SIZE), small, unknown=5)
    assert mapped.encode("3 4") == [0, 1]


def test_a_tokenizer_that_is_larger_than_the_table():
    with pytest.raises(InputError, match=r"out of range.*the tokenizer has ids up to 59"):
        graphprune.trim_vocabulary(Language(), [3, 45], tokens(2, 5), tokenizer=Tokens(60))
    with pytest.raises(InputError) as told:
        graphprune.trim_vocabulary(Language(), [3, 70], tokens(2, 5), tokenizer=Tokens(60))
    assert "tokenizer" not in str(told.value)


def test_a_tokenizer_that_is_trimmed_already():
    """The ids of a small vocabulary are told from those of the original's."""
    small, _ = trimmed(Language(), range(10, 30))
    twice = graphprune.trim_vocabulary(small, [2, 5, 7], tokens(2, 5) % 20)
    (vocabulary,) = twice.graphprune_plan.vocabularies
    assert (vocabulary.size, vocabulary.kept, vocabulary.between) == (40, (12, 15, 17), (20,))
    assert Plan.from_json(twice.graphprune_plan.to_json()).vocabularies == (vocabulary,)
    for model, size in ((small, 20), (twice, 20), (twice, 3)):
        with pytest.raises(InputError, match=rf"{size} ids, .*not a trimmed one"):
            graphprune.MappedTokenizer(Tokens(size), model)
    assert graphprune.MappedTokenizer(Tokens(SIZE), twice).encode("15 17") == [1, 2]
    first, _ = trimmed(Language(), range(20))  # the same ids in both
    assert graphprune.MappedTokenizer(Tokens(20), first).encode("15 17") == [15, 17]
