"""Folders of transformers that hold a plan: written, and loaded in fresh processes."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import graphprune
from graphprune.errors import CheckpointError, InputError, ModelError, PruningWarning

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
IDS = torch.arange(3, 13).view(2, 5)
X = {"input_ids": IDS}
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    getattr(transformers.logging, "disable_progress_bar", lambda: None)()


def llama(**fields):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **fields})).eval()


def pruned(model, ratio=0.4, inputs=X, **options):
    """Smaller by a plan that no config says."""
    graph = graphprune.trace(model, inputs, **options)
    with pytest.warns(PruningWarning, match=r"save_pretrained writes the plan beside it"):
        return graphprune.rebuild(model, graph.plan(ratio, scope="global"), inputs)


def same(one, other, inputs=X):
    with torch.no_grad():
        return torch.equal(one(**inputs)[0], other(**inputs)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model, its tied weights and rotary tables cut, and a folder of several shards."""
    folder = tmp_path_factory.mktemp("saved") / "small"
    small = pruned(llama(), attention="head_dim")
    small.config.use_cache = True
    small.save_pretrained(folder, max_shard_size="10KB")
    return small, folder


FRESH = """
import json, sys
import torch, transformers
transformers.logging.set_verbosity_error()
auto = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
import graphprune  # which tells transformers that is loaded how to read such folders
door = graphprune.from_pretrained(sys.argv[1])
told = sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING
plain = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1]) if "graphprune" in told else door
ids = torch.arange(3, 13).view(2, 5)
with torch.no_grad():
    for model in (auto, door, plain):
        print(json.dumps([type(model).__name__, model(input_ids=ids)[0].double().tolist()]))
"""


def test_a_fresh_process_loads_the_small_model(saved):
    small, folder = saved
    run = [sys.executable, "-W", "ignore", "-c", FRESH, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-3:]:
        kind, values = json.loads(line)
        assert kind == "LlamaForCausalLM"
        assert torch.equal(torch.tensor(values), small(**X)[0].double())


def test_what_a_folder_holds(saved):
    _, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "graphprune_plan.json", "modeling_graphprune.py"} <= names
    assert {"generation_config.json", "model.safetensors.index.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".part"))]
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == LLAMA["hidden_size"], "the original's"
    assert config["use_cache"], "what the user changed is kept"
    assert list(config["auto_map"]) == ["AutoModelForCausalLM"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "lm_head.weight" not in index["weight_map"], "tied weights are there once"


def test_the_model_is_the_small_one_in_all_that_it_has(saved):
    small, folder = saved
    loaded = graphprune.from_pretrained(folder)
    assert type(loaded) is type(small)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.graphprune_plan == small.graphprune_plan
    assert not loaded.training
    assert not hasattr(loaded.config, "graphprune")
    assert not hasattr(loaded.config, "auto_map")
    wanted = small.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4, do_sample=False), wanted)
    assert loaded.num_parameters() == small.num_parameters()


def test_dtypes(saved):
    small, folder = saved
    loaded = graphprune.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.allclose(loaded(**X)[0].float(), small(**X)[0], atol=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_options_of_loaders(options, saved):
    if "attn_implementation" not in options:
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    small, folder = saved
    with torch.no_grad():
        found = graphprune.from_pretrained(folder, **options)(**X)[0].cpu()
    assert torch.allclose(found, small(**X)[0], atol=1e-5)


def test_loading_info_is_handed_on(saved):
    kind = transformers.AutoModelForCausalLM
    _, info = kind.from_pretrained(saved[1], trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())


def test_folders_without_a_plan_load_as_ever(tmp_path, saved):
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert same(loaded, model)
    assert same(graphprune.from_pretrained(tmp_path / "plain"), model)
    small = graphprune.rebuild(model, 0.5, X)  # its config says it
    small.save_pretrained(tmp_path / "uniform")
    assert same(graphprune.from_pretrained(tmp_path / "uniform"), small)
    made = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(made) is type(model)


def test_a_part_is_a_folder_of_its_own(saved, tmp_path):
    small, _ = saved
    small.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is type(small.model)
    assert same(loaded, small.model)


@pytest.mark.slow
def test_rounds(saved, tmp_path):
    """Of a loaded model, and after a round that a config says."""
    loaded = graphprune.from_pretrained(saved[1])
    loaded.config.use_cache = False
    again = pruned(loaded, 0.3)
    again.save_pretrained(tmp_path / "again")
    assert same(graphprune.from_pretrained(tmp_path / "again"), again)
    first = graphprune.rebuild(llama(), 0.5, X)
    assert first.config.hidden_size == 16
    second = pruned(first, 0.3)
    second.save_pretrained(tmp_path / "second")
    third = graphprune.from_pretrained(tmp_path / "second")
    assert same(third, second)
    third.save_pretrained(tmp_path / "third")
    assert same(graphprune.from_pretrained(tmp_path / "third"), second)


def test_the_file_of_graphprune_becomes_a_folder(saved, tmp_path):
    small, _ = saved
    path = graphprune.save(small, tmp_path / "small.safetensors")
    config = transformers.LlamaConfig(**LLAMA)
    loaded = graphprune.load(path, lambda: transformers.LlamaForCausalLM(config)).eval()
    loaded.save_pretrained(tmp_path / "folder")
    assert same(graphprune.from_pretrained(tmp_path / "folder"), small)


class Own(transformers.LlamaForCausalLM):
    """A class that is not of the library."""


def test_classes_of_the_user_are_named(tmp_path):
    torch.manual_seed(0)
    small = pruned(Own(transformers.LlamaConfig(**LLAMA)).eval())
    small.save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_graphprune.py").exists()
    with pytest.raises(ModelError, match=r"holds a Own.*pass model_class"):
        graphprune.from_pretrained(tmp_path)
    loaded = graphprune.from_pretrained(tmp_path, model_class=Own)
    assert type(loaded) is Own
    assert same(loaded, small)


def test_no_pickles(saved, tmp_path):
    small, _ = saved
    with pytest.raises(InputError, match="safetensors"):
        small.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


# --- damaged folders --------------------------------------------------------------------------


def shards(folder):
    return sorted(folder.glob("*-of-*.safetensors"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def write_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    name = "model.norm.weight"
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    path = folder / content["weight_map"].pop(name)
    index.write_text(json.dumps(content))
    held = load_file(path)
    del held[name]
    save_file(held, path, metadata={"format": "pt"})


DAMAGE = {
    "a shard is missing": (lambda f: shards(f)[1].unlink(), "cannot be loaded"),
    "a shard is cut": (lambda f: cut(shards(f)[1]), "cannot be loaded"),
    "a tensor is missing": (without_a_tensor, r"missing in its files: model\.norm\.weight"),
    "no plan": (lambda f: (f / "graphprune_plan.json").unlink(), "has no file graphprune_plan"),
    "half a plan": (lambda f: cut(f / "graphprune_plan.json"), "cannot read the plan"),
    "another config": (lambda f: write_config(f, hidden_size=64), "does not fit what its config"),
    "half a config": (lambda f: cut(f / "config.json"), r"cannot read .*config\.json"),
    "another version": (
        lambda f: write_config(f, graphprune={"format": 2, "digest": ""}),
        "this graphprune reads 1",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_say_what_is_wrong(what, saved, tmp_path):
    damage, said = DAMAGE[what]
    folder = shutil.copytree(saved[1], tmp_path / "f")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        graphprune.from_pretrained(folder)


def test_a_class_that_is_none_of_the_library_is_not_looked_for(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "f")
    write_config(folder, architectures=["os.system"])
    with pytest.raises(ModelError, match="no class of transformers"):
        graphprune.from_pretrained(folder)


# --- plain from_pretrained --------------------------------------------------------------------

door = pytest.mark.skipif(
    not importlib.util.find_spec("transformers.core_model_loading"),
    reason="transformers 4 has no door for it",
)


@door
@pytest.mark.parametrize(
    "options",
    [{}, {"device_map": "cpu"}, {"attn_implementation": "eager"}, {"output_loading_info": True}],
    ids=str,
)
def test_plain_loading(options, saved):
    if "device_map" in options:
        pytest.importorskip("accelerate", reason="accelerate is not installed")
    small, folder = saved
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder, **options)
    if "output_loading_info" in options:
        loaded, info = loaded
        assert not any(info.values())
    assert type(loaded) is type(small)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.graphprune_plan == small.graphprune_plan
    assert getattr(loaded, "hf_quantizer", None) is None
    for name in ("graphprune", "quantization_config", "auto_map"):
        assert not hasattr(loaded.config, name)
    assert torch.allclose(loaded(**X)[0], small(**X)[0], atol=1e-5)
    wanted = small.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4, do_sample=False), wanted)


@door
def test_plain_dtypes_are_those_of_the_door_of_graphprune(saved):
    _, folder = saved
    plain = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    other = graphprune.from_pretrained(folder, dtype=torch.bfloat16)
    held = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (plain, other)]
    assert {k: (v.dtype, v.shape) for k, v in held[0].items()} == {
        k: (v.dtype, v.shape) for k, v in held[1].items()
    }
    assert all(torch.equal(value, held[1][name]) for name, value in held[0].items())


@door
def test_values_that_no_file_holds_are_the_originals(tmp_path):
    torch.manual_seed(0)
    fields = {k: v for k, v in LLAMA.items() if k != "tie_word_embeddings"}
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**fields, head_dim=8)).eval()
    small = pruned(model)
    small.save_pretrained(tmp_path)
    loaded = transformers.GemmaForCausalLM.from_pretrained(tmp_path)
    assert same(loaded, small)
    loaded.save_pretrained(tmp_path / "again")
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), small)


@door
@pytest.mark.parametrize(
    "what", [what for what in DAMAGE if "shard" not in what and what != "half a config"]
)
def test_plain_loading_of_damaged_folders(what, saved, tmp_path):
    damage, said = DAMAGE[what]
    folder = shutil.copytree(saved[1], tmp_path / "f")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        transformers.LlamaForCausalLM.from_pretrained(folder)


# --- trainers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainers_resume(tmp_path):
    """Checkpoints of a Trainer are such folders, and training goes on from one."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    small = pruned(llama())
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 6))]

    def trainer(model, steps):
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=2,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=0, learning_rate=1e-2,
            lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model, options, train_dataset=data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(small, 4).train()
        checkpoint = tmp_path / "checkpoint-2"
        again = graphprune.from_pretrained(checkpoint)
        assert not same(again, small)
        trainer(again, 4).train(resume_from_checkpoint=str(checkpoint))
    assert torch.allclose(again(**X)[0], small(**X)[0], atol=1e-5)
    assert same(graphprune.from_pretrained(tmp_path / "checkpoint-4"), again)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs" / "hugging-face.md"
    blocks = re.findall(r"^```py\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 3
    if not importlib.util.find_spec("timm"):
        blocks = [block for block in blocks if "import timm" not in block]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec("\n".join(blocks), {})
