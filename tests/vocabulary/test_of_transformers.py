"""Vocabularies of models of a library: tied and not, encoders and decoders, configs and folders."""

import copy

import pytest
import torch
from support.comparing import untouched

import graphprune
from graphprune.errors import InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SIZE = 60
PLAIN = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
GPT2 = {
    "vocab_size": SIZE, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24,
    "bos_token_id": 59, "eos_token_id": 59,
}  # fmt: skip
T5 = {
    "vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": SIZE, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 24,
}  # fmt: skip
PADDED = {"pad_token_id": 59, "decoder_start_token_id": 59, "eos_token_id": 0}
DISTIL = {
    "vocab_size": SIZE, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24,
    "max_position_embeddings": 24,
}  # fmt: skip
OPT = {
    "vocab_size": SIZE, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 24,
    "num_attention_heads": 2, "max_position_embeddings": 24, "word_embed_proj_dim": 8,
}  # fmt: skip
TWO = {"num_key_value_heads": 1}
QWEN = {"tie_word_embeddings": True, "bos_token_id": 50, "eos_token_id": [51, 52]}
KINDS = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2, "tokens"),
    "LlamaForCausalLM": ("LlamaConfig", {**PLAIN, **TWO, "pad_token_id": 40}, "tokens"),
    "BertForMaskedLM": ("BertConfig", PLAIN, "tokens"),
    "T5ForConditionalGeneration": ("T5Config", T5, "both"),
}
MORE = {
    "BertModel": ("BertConfig", PLAIN, "types"),
    "RobertaForMaskedLM": ("RobertaConfig", PLAIN, "tokens"),
    "AlbertForMaskedLM": ("AlbertConfig", {**PLAIN, "embedding_size": 8}, "tokens"),
    "BartForConditionalGeneration": ("BartConfig", BART, "tokens"),
    "MarianMTModel": ("MarianConfig", {**BART, **PADDED}, "both"),
    "DistilBertForMaskedLM": ("DistilBertConfig", DISTIL, "tokens"),
    "ElectraForMaskedLM": ("ElectraConfig", {**PLAIN, "embedding_size": 8}, "tokens"),
    "Qwen2ForCausalLM": ("Qwen2Config", {**PLAIN, **TWO, **QWEN}, "tokens"),
    "OPTForCausalLM": ("OPTConfig", OPT, "tokens"),
    "GemmaForCausalLM": ("GemmaConfig", {**PLAIN, **TWO, "head_dim": 8}, "tokens"),
    "MPNetForMaskedLM": ("MPNetConfig", PLAIN, "tokens"),
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": SIZE, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        "tokens",
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", PLAIN, "tokens"),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", PLAIN, "tokens"),
    "MBartForConditionalGeneration": ("MBartConfig", BART, "both"),
}


def model_of(name):
    config, fields, inputs = {**KINDS, **MORE}[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    ids = torch.randint(5, SIZE, (2, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids}
    if inputs == "types":
        given |= {"token_type_ids": ids % 2, "attention_mask": torch.ones_like(ids)}
    if inputs == "both":
        given |= {"decoder_input_ids": ids[:, :4]}
    return model, given


def first(model, inputs):
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def trimmed(name):
    model, inputs = model_of(name)
    ids = [5, 8, 13, 21, 34, 55]
    with untouched(model):
        before = copy.deepcopy(model.config.to_dict())
        small = graphprune.trim_vocabulary(model, ids, inputs)
        report = graphprune.verify(model, small, inputs)
    assert report.verdict == "equal"
    assert model.config.to_dict() == before
    (vocabulary,) = small.graphprune_plan.vocabularies
    kept = torch.tensor(vocabulary.kept)
    assert {*ids} <= {*vocabulary.kept}
    assert len(kept) <= 12
    old = {n: kept[i % len(kept)] if n in vocabulary.inputs else i for n, i in inputs.items()}
    new = {n: vocabulary.to_new(i) if n in vocabulary.inputs else i for n, i in old.items()}
    wanted = first(model, old)
    wanted = wanted[..., kept] if vocabulary.outputs else wanted
    torch.testing.assert_close(first(small, new), wanted, atol=2e-6, rtol=0)
    return model, small, vocabulary, new


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_logits_are_the_originals(name, tmp_path):
    model, small, vocabulary, new = trimmed(name)
    assert small.config.vocab_size == len(vocabulary.kept)
    for key, old in model.config.to_dict().items():
        if key.endswith("token_id") and isinstance(old, int):
            assert getattr(small.config, key) == vocabulary.new_id(old), key
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(first(again, new), first(small, new))
    generation = getattr(model, "generation_config", None)
    if generation is not None and isinstance(generation.eos_token_id, int):
        expected = vocabulary.new_id(generation.eos_token_id)
        assert again.generation_config.eos_token_id == expected


def test_generated_ids_are_the_originals():
    """Among ids that stay: the original is told never to choose others."""
    model, inputs = model_of("GPT2LMHeadModel")
    small = graphprune.trim_vocabulary(model, range(0, SIZE, 3), inputs)
    (vocabulary,) = small.graphprune_plan.vocabularies
    others = [number for number in range(SIZE) if number not in vocabulary.kept]
    start = torch.tensor([[3, 30, 57]])
    told = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(start)}
    wanted = model.generate(start, suppress_tokens=others, pad_token_id=59, **told)
    new = vocabulary.new_id(59)
    found = small.generate(vocabulary.to_new(start), pad_token_id=new, **told)
    assert [vocabulary.old_id(n) for n in found[0].tolist()] == wanted[0].tolist()


def test_pads_count_places():
    """The number of the padding is also added to places there, and must therefore stay."""
    model, inputs = model_of("RobertaForMaskedLM")
    model.config.bos_token_id = None
    with untouched(model), pytest.raises(InputError, match=r"1 becomes 0.*keep all ids below"):
        graphprune.trim_vocabulary(model, [5, 8, 13], inputs)


@pytest.mark.parametrize(
    "name",
    [
        "T5ForConditionalGeneration",
        pytest.param("BartForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_inputs_need_not_be_given(name):
    model, _ = model_of(name)
    small = graphprune.trim_vocabulary(model, [5, 8, 13])
    found = {*small.graphprune_plan.vocabularies[0].inputs}
    assert found <= {"input_ids", "decoder_input_ids"}
    assert graphprune.verify(model, small).verdict == "equal"


def test_generation_of_whisper():
    fields = {
        **BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30,
        "pad_token_id": 50, "bos_token_id": 50, "eos_token_id": 50, "decoder_start_token_id": 51,
        "suppress_tokens": None, "begin_suppress_tokens": [5, 50],
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**fields))
    told = model.eval().generation_config
    told.is_multilingual, told.no_timestamps_token_id = True, 56
    told.lang_to_id = {"<|en|>": 52, "<|de|>": 53}
    told.task_to_id = {"transcribe": 54, "translate": 55}
    ids = torch.tensor([[51, 53], [51, 52]])
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids}
    small = graphprune.trim_vocabulary(model, [3, 7, 20], inputs)
    assert small.graphprune_plan.vocabularies[0].kept == (3, 7, 20, *range(50, 57))
    assert small.generation_config.lang_to_id == {"<|en|>": 5, "<|de|>": 6}
    assert small.generation_config.task_to_id == {"transcribe": 7, "translate": 8}
    assert small.generation_config.begin_suppress_tokens == [3]
    assert told.lang_to_id == {"<|en|>": 52, "<|de|>": 53}


def test_training_with_new_labels():
    model, inputs = model_of("GPT2LMHeadModel")
    small = graphprune.trim_vocabulary(model, [5, 8, 13], inputs)
    new = small.graphprune_plan.vocabularies[0].to_new(torch.tensor([[5, 8, 13, 40]]))
    labels = new.masked_fill(new < 0, -100)
    ids = new.clamp(min=0)
    loss = small(input_ids=ids, labels=labels).loss
    logits = small(input_ids=ids).logits[0, :2]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, new[0, 1:3]))


def test_labels_are_refused():
    model, inputs = model_of("GPT2LMHeadModel")
    with pytest.raises(InputError, match="example_inputs without labels"):
        graphprune.trim_vocabulary(model, [5, 8], {**inputs, "labels": inputs["input_ids"]})
