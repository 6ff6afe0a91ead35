"""Tokenizers of small vocabularies: the same tokens as the original makes, with new ids."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.errors import InputError
from graphprune.vocabulary.pieces import Pieces

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
LINES = [
    "the small model is the large model without what it does not need",
    "a tokenizer cuts texts into tokens, and tokens into smaller ones",
    "words that are frequent are tokens of their own; rare words are not",
    "pruning removes channels, blocks and the rows of tables",
    "naïve café façade, ünïcödé is in some of the lines as well",
    "0123456789 numbers and (punctuation), too!",
]


def bytes_bpe():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made, tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def bpe(**more):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", **more))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    told = {k: v for k, v in more.items() if k != "fuse_unk"}
    return made, tokenizers.trainers.BpeTrainer(
        vocab_size=180, special_tokens=["<s>", "<unk>"], show_progress=False, **told
    )


def suffixed():
    return bpe(end_of_word_suffix="</w>")


def prefixed():
    return bpe(continuing_subword_prefix="##")


def wordpiece():
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return made, tokenizers.trainers.WordPieceTrainer(
        vocab_size=180, special_tokens=special, show_progress=False
    )


def unigram():
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    return made, tokenizers.trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )


def words():
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made, tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)


KINDS = {
    "bytes": bytes_bpe,
    "bpe": bpe,
    "suffixed": suffixed,
    "prefixed": prefixed,
    "wordpiece": wordpiece,
    "unigram": unigram,
    "words": words,
}
TRAINED = {}


def tokenizer_of(kind):
    if kind not in TRAINED:
        made, trainer = KINDS[kind]()
        made.train_from_iterator(LINES, trainer)
        TRAINED[kind] = made
    return tokenizers.Tokenizer.from_str(TRAINED[kind].to_str())


class Language(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.embed = nn.Embedding(size, 4)

    def forward(self, tokens):
        return self.embed(tokens) @ self.embed.weight.T


def small_of(made, ids, **more):
    model = Language(made.get_vocab_size())
    return graphprune.trim_vocabulary(model, ids, torch.tensor([[1, 2]]), **more)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(st.sets(st.integers(0, len(LINES) - 1), min_size=1, max_size=3))
def test_texts_of_kept_tokens_are_cut_as_before(kind, places):
    tokenizer = tokenizer_of(kind)
    lines = [LINES[place] for place in places]
    ids = graphprune.kept_ids_by_count(lines, tokenizer)
    pieces = Pieces(json.loads(tokenizer.to_str()))
    assert not pieces.beside(ids)
    new = {old: place for place, old in enumerate(ids)}
    data = pieces.trimmed(new)
    made = tokenizers.Tokenizer.from_str(json.dumps(data))
    assert made.get_vocab_size() == len(ids)
    for line in lines:
        wanted, found = tokenizer.encode(line), made.encode(line)
        assert found.tokens == wanted.tokens
        assert found.ids == [new[number] for number in wanted.ids]
        assert made.decode(found.ids) == tokenizer.decode(wanted.ids)
    if kind == "bytes":  # nothing is ever lost
        assert all(made.decode(made.encode(line).ids) == line for line in LINES)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "suffixed", "prefixed"])
def test_merges_stay_closed(kind):
    """The parts of a token that was asked for come with it, and are told."""
    tokenizer = tokenizer_of(kind)
    pieces = Pieces(json.loads(tokenizer.to_str()))
    longest = max(tokenizer.encode(LINES[0]).ids, key=lambda number: len(pieces.tokens[number]))
    parts = pieces.parts(pieces.tokens[longest])
    assert len(parts) > 3
    small = small_of(tokenizer, [longest], tokenizer=tokenizer)
    kept = small.graphprune_plan.vocabularies[0].kept
    assert {pieces.ids[part] for part in parts} <= {*kept}
    assert "as the tokenizer names them" in str(small.graphprune_plan)
    trimmed = graphprune.trim_tokenizer(tokenizer, small)
    if kind == "bytes":
        token = pieces.tokens[longest]
        text = tokenizer.decode([longest])
        assert trimmed.encode(text).tokens == [token]
    with pytest.raises(InputError, match=r"must stay as well: .*tokenizer= to"):
        graphprune.trim_tokenizer(tokenizer, small_of(tokenizer, [longest]))


def test_special_tokens_around_a_text_follow():
    tokenizer = tokenizer_of("wordpiece")
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    template = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    bert = tokenizers.processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    both = tokenizers.processors.Sequence([template])
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=30)
    for processor in (template, bert, both):
        tokenizer.post_processor = processor
        ids = graphprune.kept_ids_by_count(LINES[:1], tokenizer)
        assert {0, cls, sep} <= {*ids}
        small = small_of(tokenizer, ids)
        trimmed = graphprune.trim_tokenizer(tokenizer, small)
        (vocabulary,) = small.graphprune_plan.vocabularies
        wanted, found = tokenizer.encode(LINES[0]), trimmed.encode(LINES[0])
        assert found.tokens == wanted.tokens
        assert [vocabulary.old_id(number) for number in found.ids] == wanted.ids


def test_the_users_own_tokenizer_with_its_ids_mapped():
    tokenizer = tokenizer_of("wordpiece")
    small = small_of(tokenizer, graphprune.kept_ids_by_count(LINES[:2], tokenizer))
    mapped = graphprune.MappedTokenizer(tokenizer, small)
    assert mapped.decode(mapped.encode(LINES[0])) == tokenizer.decode(
        tokenizer.encode(LINES[0]).ids
    )
    unknown = mapped.vocabulary.new_id(tokenizer.token_to_id("[UNK]"))
    assert unknown in mapped.encode(LINES[5])
    with pytest.raises(InputError, match="999 is no id of this vocabulary"):
        mapped.decode([999])
    with pytest.raises(InputError, match="expected a text"):
        mapped.encode(3)


def test_what_left_is_told_where_nothing_stands_for_it():
    tokenizer = tokenizer_of("bytes")
    ids = graphprune.kept_ids_by_count(LINES[:1], tokenizer)
    mapped = graphprune.MappedTokenizer(tokenizer, small_of(tokenizer, ids))
    with pytest.raises(InputError, match=r"left the vocabulary.*unknown="):
        mapped.encode(LINES[3])
    told = graphprune.MappedTokenizer(tokenizer, small_of(tokenizer, ids), unknown=0)
    assert told.unknown in told.encode(LINES[3])


def test_other_tokenizers_are_refused():
    small = small_of(tokenizer_of("words"), [0, 1])
    with pytest.raises(InputError, match=r"object has no tokenizer.*MappedTokenizer"):
        graphprune.trim_tokenizer(object(), small)
    with pytest.raises(InputError, match="it has none"):
        graphprune.trim_tokenizer(tokenizer_of("words"), nn.Linear(2, 2))
    with pytest.raises(InputError, match="kind 'Other' cannot be trimmed"):
        Pieces({"model": {"type": "Other"}})


def test_the_tokenizer_of_a_vocabulary_that_shrank_twice():
    tokenizer = tokenizer_of("wordpiece")
    small = small_of(tokenizer, graphprune.kept_ids_by_count(LINES[:3], tokenizer))
    first = graphprune.trim_tokenizer(tokenizer, small)
    ids = graphprune.kept_ids_by_count(LINES[:1], first)
    twice = graphprune.trim_vocabulary(small, ids, torch.tensor([[1, 2]]), tokenizer=first)
    with pytest.raises(InputError, match="pass the tokenizer of the original model"):
        graphprune.trim_tokenizer(first, twice)
    again = graphprune.trim_tokenizer(tokenizer, twice)
    assert again.encode(LINES[0]).tokens == tokenizer.encode(LINES[0]).tokens
    assert again.get_vocab_size() == len(ids) < first.get_vocab_size()


def test_gaps_that_a_file_cannot_say():
    """A row without a token in the middle: added tokens are numbered one after the other."""
    tokenizer = tokenizer_of("words")
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<end>"])
    model = Language(size + 4)
    small = graphprune.trim_vocabulary(model, [0, 1, size + 2], tokenizer=tokenizer)
    assert graphprune.trim_tokenizer(tokenizer, small).token_to_id("<end>") == 2
    unigram = tokenizer_of("unigram")
    pieces = Pieces(json.loads(unigram.to_str()))
    new = {old: 2 * old for old in pieces.tokens}
    with pytest.raises(InputError, match="without gaps"):
        pieces.trimmed(new)


def test_counts():
    texts = [[1, 1, 1, 2, -100], torch.tensor([[2, 3], [1, 4]])]
    by_count = graphprune.kept_ids_by_count
    assert by_count(texts) == [1, 2, 3, 4]
    assert by_count(texts, min_count=2) == [1, 2]
    assert by_count(texts, top=1) == [1]
    assert by_count(texts, share=0.5) == [1]
    assert by_count(texts, share=0.51) == [1, 2]
    assert by_count(texts, share=1.0) == [1, 2, 3, 4]
    assert by_count(iter(texts), top=3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"texts": "abc"}, "several texts"),
        ({"texts": ["abc"]}, "pass the tokenizer"),
        ({"texts": [[1.5]]}, "found 1.5"),
        ({"texts": []}, "hold 0 tokens"),
        ({"texts": [[1]], "min_count": 0}, "min_count"),
        ({"texts": [[1]], "min_count": 2}, "no id occurs 2 times"),
        ({"texts": [[1]], "top": True}, "top"),
        ({"texts": [[1]], "share": 0}, "share"),
        ({"texts": [[1]], "share": 1.1}, "share"),
    ],
)
def test_wrong_counts(options, told):
    with pytest.raises(InputError, match=told):
        graphprune.kept_ids_by_count(**options)


def test_a_tokenizer_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backend = tokenizer_of("wordpiece")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )
    ids = graphprune.kept_ids_by_count(LINES[:2], fast)
    small = small_of(backend, ids, tokenizer=fast)
    trimmed = graphprune.trim_tokenizer(fast, small)
    mapped = graphprune.MappedTokenizer(fast, small)
    wanted = mapped(LINES[:2], padding=True, return_tensors="pt")["input_ids"]
    assert torch.equal(trimmed(LINES[:2], padding=True, return_tensors="pt")["input_ids"], wanted)
    assert mapped(LINES[:2])["input_ids"] == trimmed(LINES[:2])["input_ids"]
    both = mapped(LINES[0], text_target=LINES[1])
    assert both["labels"] == mapped(LINES[1])["input_ids"] != both["input_ids"]
    arrays = mapped(LINES[:1], return_tensors="np")["input_ids"]
    assert arrays.tolist() == [mapped(LINES[0])["input_ids"]]
    with pytest.raises(InputError, match="not a trimmed one"):
        graphprune.trim_tokenizer(trimmed, small)
    assert len(fast) == backend.get_vocab_size() > len(trimmed) == len(ids)
    assert trimmed.pad_token_id == small.graphprune_plan.vocabularies[0].new_id(fast.pad_token_id)
    trimmed.save_pretrained(tmp_path)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(LINES[0])["input_ids"] == trimmed(LINES[0])["input_ids"]
    assert again.unk_token_id == trimmed.unk_token_id
