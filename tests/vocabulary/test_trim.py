"""Fewer ids: logits of those that stay are the original's, and nothing else has changed."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import untouched
from torch import nn

import graphprune
from graphprune.errors import InputError, PlanError

SIZE = 40


class Tied(nn.Module):
    """A language model whose output layer is its table."""

    def __init__(self, tied=True, bias=False, padding=None):
        super().__init__()
        self.embed = nn.Embedding(SIZE, 16, padding_idx=padding)
        self.hidden = nn.Linear(16, 24)
        self.back = nn.Linear(24, 16)
        self.head = nn.Linear(16, SIZE, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.back(torch.tanh(self.hidden(x))))


class Encoder(nn.Module):
    """A sentence encoder: no logits, a mask from the ids, and types of tokens beside them."""

    def __init__(self):
        super().__init__()
        self.pad = 7
        self.words = nn.Embedding(SIZE, 16, padding_idx=self.pad)
        self.types = nn.Embedding(2, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, tokens, types):
        mask = tokens.ne(self.pad).unsqueeze(-1)
        x = (self.words(tokens) + self.types(types)) * mask
        return {"pooled": self.out(x.sum(1) / mask.sum(1).clamp(min=1))}


class Bag(nn.Module):
    """Rows read by plain indexing, logits made by a bare parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(SIZE, 12))
        self.out = nn.Parameter(torch.randn(12, SIZE))
        self.register_buffer("shift", torch.randn(1, SIZE))

    def forward(self, tokens):
        return (torch.tanh(self.table[tokens]) @ self.out + self.shift,)


class Shifted(nn.Module):
    """An encoder and a decoder with one table: the decoder is given its own ids, shifted."""

    def __init__(self, start=5):
        super().__init__()
        self.start = start
        self.shared = nn.Embedding(SIZE, 16)
        self.mix = nn.Linear(16, 16)

    def forward(self, source, target):
        given = target.new_zeros(target.shape)
        given[:, 1:] = target[:, :-1].clone()
        given[:, 0] = self.start
        given.masked_fill_(given == -100, 3)
        context = self.mix(self.shared(source)).mean(1, keepdim=True)
        return (self.shared(given) + context) @ self.shared.weight.T


def tokens(*shape):
    return torch.randint(SIZE, shape, generator=torch.Generator().manual_seed(3))


MODELS = {
    "tied": (Tied, lambda: {"tokens": tokens(2, 6)}),
    "untied": (lambda: Tied(False, True), lambda: {"tokens": tokens(2, 6)}),
    "tied with a bias": (lambda: Tied(True, True, 4), lambda: {"tokens": tokens(2, 6)}),
    "encoder": (Encoder, lambda: {"tokens": tokens(2, 6), "types": tokens(2, 6) % 2}),
    "bare": (Bag, lambda: {"tokens": tokens(3, 5)}),
    "shifted": (Shifted, lambda: {"source": tokens(2, 4), "target": tokens(2, 6)}),
}


def model_of(name):
    torch.manual_seed(1)
    make, inputs = MODELS[name]
    return make().double().eval(), inputs()


def leaf(out):
    return out if isinstance(out, torch.Tensor) else next(iter(dict(enumerate(out)).values()))


def logits(model, inputs):
    out = model(**inputs)
    return next(iter(out.values())) if isinstance(out, dict) else leaf(out)


def check(model, small, inputs):
    """By hand, with nothing of what verify does: outputs and gradients of rows that stay."""
    (vocabulary,) = small.graphprune_plan.vocabularies
    kept = torch.tensor(vocabulary.kept)
    drawn = {
        name: kept[ids % len(kept)] if name in vocabulary.inputs else ids
        for name, ids in inputs.items()
    }
    given = {n: vocabulary.to_new(i) if n in vocabulary.inputs else i for n, i in drawn.items()}
    wanted, found = logits(model, drawn), logits(small, given)
    wanted = wanted[..., kept] if vocabulary.outputs else wanted
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    weights = torch.randn_like(wanted)
    for each, out in ((model, wanted), (small, found)):
        each.zero_grad()
        (out * weights).sum().backward()
    slots = {slot.tensor: slot for slot in small.graphprune_plan.slots}
    theirs = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is None:
            continue
        if name in slots:
            grad = grad.index_select(slots[name].dim, torch.tensor(slots[name].kept))
        torch.testing.assert_close(theirs[name].grad, grad, atol=1e-10, rtol=0)
    for each in (model, small):
        each.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_the_originals(name):
    model, inputs = model_of(name)
    ids = [2, 9, 11, 30, 39]
    with untouched(model):
        small = graphprune.trim_vocabulary(model, ids, inputs)
    plan = small.graphprune_plan
    assert {*ids} <= {*plan.vocabularies[0].kept} < {*range(SIZE)}
    assert plan.after.params == sum(p.numel() for p in small.parameters())
    check(model, small, inputs)
    report = graphprune.verify(model, small, inputs)
    assert report.verdict == "equal"
    assert report.difference <= 1e-10


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sets(st.integers(0, SIZE - 1), min_size=1, max_size=SIZE),
)
def test_any_ids(name, ids):
    """One of them is beyond all smaller tables of the model: which one is meant is clear."""
    model, inputs = model_of(name)
    check(model, graphprune.trim_vocabulary(model, ids | {SIZE - 1}, inputs), inputs)


def test_a_wrong_row_is_seen():
    model, inputs = model_of("tied")
    small = graphprune.trim_vocabulary(model, [1, 5, 9], inputs)
    with torch.no_grad():
        small.embed.weight[[0, 1]] = small.embed.weight[[1, 0]]
    with pytest.raises(graphprune.errors.VerificationError):
        graphprune.verify(model, small, inputs)


def test_an_attribute_that_is_an_id_follows():
    model, inputs = model_of("encoder")
    small = graphprune.trim_vocabulary(model, [20, 3], inputs)
    assert small.graphprune_plan.vocabularies[0].kept == (3, 7, 20)
    assert (small.pad, small.words.padding_idx, small.words.num_embeddings) == (1, 1, 3)
    assert (model.pad, model.words.padding_idx) == (7, 7)
    assert "7 (words.padding_idx)" in str(small.graphprune_plan)


def test_numbers_in_the_code_follow():
    model, inputs = model_of("shifted")
    small = graphprune.trim_vocabulary(model, [20, 30], inputs)
    assert small.graphprune_plan.vocabularies[0].kept == (0, 3, 5, 20, 30)
    assert small.start == 2
    given = torch.tensor([[3, -100, 4]])
    kept = [0, 3, 5, 20, 30]
    old = torch.tensor([[20, -100, 30]])
    wanted = model(torch.tensor([[20]]), old)[..., kept]
    torch.testing.assert_close(small(torch.tensor([[3]]), given), wanted, atol=1e-12, rtol=0)


def test_the_map_is_part_of_the_plan(tmp_path):
    model, inputs = model_of("tied with a bias")
    small = graphprune.trim_vocabulary(model, [1, 5, 9, 9], inputs)
    plan = graphprune.Plan.from_json(small.graphprune_plan.to_json())
    assert plan == small.graphprune_plan
    (vocabulary,) = plan.vocabularies
    assert vocabulary.kept == (1, 4, 5, 9)
    assert vocabulary.to_new(torch.tensor([9, 2, -100])).tolist() == [3, -1, -100]
    assert vocabulary.old_id(2) == 5
    path = graphprune.save(small, tmp_path / "small.safetensors")
    for loaded in (graphprune.load(path, model), graphprune.rebuild(model, plan)):
        check(model, loaded, inputs)
    damaged = copy.copy(plan)
    vars(damaged)["vocabularies"] = (copy.copy(vocabulary),)
    vars(damaged.vocabularies[0])["kept"] = (0, 4, 5, 9)
    with pytest.raises(PlanError, match="does not lose the ids that leave"):
        graphprune.rebuild(model, damaged)


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("first", ["ids", "channels"])
def test_with_channels_in_either_order(first):
    model, inputs = model_of("untied")
    ids = [1, 5, 9, 12, 30]
    if first == "ids":
        middle = graphprune.trim_vocabulary(model, ids, inputs)
        new = {"tokens": torch.randint(5, (2, 6))}
        small = graphprune.rebuild(middle, 0.5, new)
    else:
        small = graphprune.trim_vocabulary(graphprune.rebuild(model, 0.5, inputs), ids, inputs)
    assert small.hidden.out_features == 12
    assert small.embed.num_embeddings == small.head.out_features == 5
    assert graphprune.verify(model, small, inputs).verdict == "equal"
    again = graphprune.rebuild(model, small.graphprune_plan)
    assert graphprune.verify(model, again, inputs).verdict == "equal"


def test_calibration_comes_before_ids_leave():
    model, inputs = model_of("untied")
    middle = graphprune.rebuild(model, 0.5, inputs)
    graphprune.calibrate(middle, model, [tokens(2, 6)] * 4)
    small = graphprune.trim_vocabulary(middle, [1, 5, 9], inputs)
    wanted = middle(torch.tensor([[9, 1]]))[..., [1, 5, 9]]
    torch.testing.assert_close(small(torch.tensor([[2, 0]])), wanted, atol=1e-12, rtol=0)
    with pytest.raises(InputError, match=r"different ids.*then call trim_vocabulary"):
        graphprune.calibrate(small, model, [tokens(2, 6)])


@pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning")
@pytest.mark.parametrize("exact", [False, True])
def test_statistics_of_channels_that_left_before(exact):
    norm = nn.Sequential(nn.Embedding(SIZE, 16), nn.Linear(16, 32), nn.RMSNorm(32))
    model = nn.Sequential(*norm, nn.Linear(32, SIZE)).double()
    middle = graphprune.rebuild(model, 0.5, tokens(2, 6), exact_only=exact)
    small = graphprune.trim_vocabulary(middle, [1, 5, 9], tokens(2, 6))
    assert small.graphprune_plan.exact == exact
    assert graphprune.verify(model, small, tokens(2, 6)).verdict == "equal"


def test_a_weight_that_is_computed():
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(nn.Embedding(SIZE, 8), norm(nn.Linear(8, SIZE))).double()
    small = graphprune.trim_vocabulary(model, [1, 5, 9], tokens(2, 6))
    assert small[1].out_features == 3
    assert graphprune.verify(model, small, tokens(2, 6)).verdict == "equal"


def test_twice():
    model, inputs = model_of("tied")
    middle = graphprune.trim_vocabulary(model, range(0, 40, 2), inputs)
    small = graphprune.trim_vocabulary(middle, [1, 3, 19])
    assert small.graphprune_plan.vocabularies[0].kept == (2, 6, 38)
    check(model, small, inputs)


def test_inputs_need_not_be_given():
    model, inputs = model_of("tied")
    check(model, graphprune.trim_vocabulary(model, torch.tensor([3, 4])), inputs)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([], "ids are empty"),
        ([-1, 3], "0 or more, found -1"),
        ([3, SIZE], f"id {SIZE} is out of range.*0 to {SIZE - 1}"),
        ([1.0], r"found 1.0 \(float\)"),
        (torch.tensor([1.5]), "found 1.5"),
        (torch.ones(SIZE, dtype=torch.bool), r"mask.nonzero\(\).flatten\(\)"),
        (torch.tensor([[1, 2]]), "found \\[1, 2\\]"),
        ("abc", "not a str"),
        (3, "not a int"),
    ],
)
def test_wrong_ids(ids, told):
    model, inputs = model_of("tied")
    with untouched(model), pytest.raises(InputError, match=told):
        graphprune.trim_vocabulary(model, ids, inputs)


class Reads(nn.Module):
    """Ids that are read in some way of their own."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(SIZE, 8)
        self.head = nn.Linear(8, SIZE)

    def forward(self, tokens):
        x = self.head(self.embed(tokens))
        return self.how(self, x, tokens)


WAYS = {
    "arithmetic": (
        lambda m, x, t: m.head(m.embed((t + 1) % SIZE)),
        "reads ids|makes ids",
    ),
    "as floats": (lambda m, x, t: x * t[..., None].float(), "reads ids"),
    "returned": (lambda m, x, t: (x, t), "they are returned"),
    "all rows": (lambda m, x, t: x + m.embed(torch.arange(SIZE)).mean(), "makes ids"),
    "softmax": (lambda m, x, t: x.softmax(-1), "softmax over channels"),
    "largest": (lambda m, x, t: (x, x.amax(-1)), "amax"),
    "loss": (
        lambda m, x, t: nn.functional.cross_entropy(x.flatten(0, 1), t.flatten()),
        "nll_loss_forward",
    ),
    "soft rows": (lambda m, x, t: m.head(x.softmax(-1) @ m.embed.weight), "depends on all logits"),
    "one row": (lambda m, x, t: x + m.embed.weight[3].sum(), "rows|row"),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_would_change_is_refused(name):
    how, told = WAYS[name]
    model = Reads(how)
    with untouched(model), pytest.raises(InputError, match=told):
        graphprune.trim_vocabulary(model, [1, 2, 30], tokens(2, 5))


RIGHT = {
    "order": lambda m, x, t: x * (t == t.max(-1, keepdim=True).values)[..., None],
    "end": lambda m, x, t: x[torch.arange(2), t.argmax(-1)],
    "bound": lambda m, x, t: x * (t >= 20)[..., None] + (t < 21)[..., None],
    "others": lambda m, x, t: x * (t > 11)[..., None] + (t <= 4)[..., None],
    "empty": lambda m, x, t: x * t.bool()[..., None],
    "joined": lambda m, x, t: m.head(m.embed(torch.cat([t.new_full((2, 1), 6), t], 1))),
    "chosen": lambda m, x, t: m.head(m.embed(torch.where(t == 9, 8, t))),
    "turned": lambda m, x, t: x * (t > 11)[..., None] + (t == 12)[..., None],
    "same": lambda m, x, t: x * (t[:, 1:] == t[:, :-1]).sum(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_depends_on_ids_comes_out_as_before(name):
    torch.manual_seed(0)
    model = Reads(RIGHT[name]).double().eval()
    inputs = {"tokens": tokens(2, 5)}
    for ids in ([2, 7, 8, 19, 33], [20, 21, 38]):
        small = graphprune.trim_vocabulary(model, ids, inputs)
        check(model, small, inputs)
        assert graphprune.verify(model, small, inputs).verdict == "equal"


class Two(nn.Module):
    """Two languages, each with its table."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(30, 8), nn.Embedding(20, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, a, b):
        return self.out(self.source(a) + self.target(b))


def test_which_table_can_be_said():
    model, inputs = Two(), (tokens(2, 5) % 20, tokens(2, 5) % 20)
    with pytest.raises(InputError, match=r"not clear which table.*source.*target.*embedding="):
        graphprune.trim_vocabulary(model, [1, 2], inputs)
    small = graphprune.trim_vocabulary(model, [1, 2], inputs, embedding="target")
    assert (small.source.num_embeddings, small.target.num_embeddings) == (30, 2)
    small = graphprune.trim_vocabulary(model, [1, 25], inputs)
    assert (small.source.num_embeddings, small.target.num_embeddings) == (2, 20)
    with pytest.raises(InputError, match=r"'out' is no table.*source.weight.*target.weight"):
        graphprune.trim_vocabulary(model, [1, 2], inputs, embedding="out")


def test_both_tables_one_after_the_other():
    model, inputs = Two().double(), (tokens(2, 5) % 20, tokens(2, 5) % 20)
    middle = graphprune.trim_vocabulary(model, [1, 2, 9], inputs, embedding="target")
    inputs = tokens(2, 5) % 20, tokens(2, 5) % 3
    small = graphprune.trim_vocabulary(middle, [1, 4, 5, 9], inputs, embedding="source")
    inputs = tokens(2, 5) % 20, tokens(2, 5) % 20
    assert [len(v.kept) for v in small.graphprune_plan.vocabularies] == [3, 4]
    assert graphprune.verify(model, small, inputs).verdict == "equal"


class Heads(nn.Module):
    """Two outputs of the size of the vocabulary."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SIZE, 8)
        self.words, self.other = nn.Linear(8, SIZE), nn.Linear(8, SIZE)

    def forward(self, tokens):
        x = self.embed(tokens)
        return {"words": self.words(x), "other": self.other(x)}


def test_which_output_can_be_said():
    model, inputs = Heads(), tokens(2, 5)
    with pytest.raises(InputError, match=r"other.weight, words.weight.*output="):
        graphprune.trim_vocabulary(model, [1, 2], inputs)
    for output, sizes in (("words", (2, SIZE)), (False, (SIZE, SIZE))):
        small = graphprune.trim_vocabulary(model, [1, 2], inputs, output=output)
        assert (small.words.out_features, small.other.out_features) == sizes
        assert graphprune.verify(model, small, inputs).verdict == "equal"
    with pytest.raises(InputError, match="output='embed' is no layer"):
        graphprune.trim_vocabulary(model, [1, 2], inputs, output="embed")


def test_a_model_without_ids_is_refused():
    with pytest.raises(InputError, match="no embedding table"):
        graphprune.trim_vocabulary(nn.Linear(4, 4), [1], torch.randn(2, 4))


def test_all_ids_stay():
    model, inputs = model_of("tied")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = graphprune.trim_vocabulary(model, range(SIZE), inputs)
    assert torch.equal(small(**inputs), model(**inputs))
