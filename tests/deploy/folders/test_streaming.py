"""Folders that shrink without the model in memory are those of the model in memory."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import graphprune
from graphprune.cli.main import app
from graphprune.deploy.folders import streaming
from graphprune.deploy.folders.streaming import STATE
from graphprune.errors import CheckpointError, InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::graphprune.errors.PruningWarning"),
    pytest.mark.skipif(
        transformers.__version__.startswith("4."),
        reason="classes of transformers 4 read values of their constants as they run",
    ),
]
IDS = {"input_ids": torch.arange(3, 13).view(2, 5)}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=2)
    ),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, vocab_size=64)
    ),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    ),
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.logging.set_verbosity_error()
    getattr(transformers.logging, "disable_progress_bar", lambda: None)()


@pytest.fixture
def llama(tmp_path):
    """A folder of three shards, with a tokenizer's file and one of code."""
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    MODELS["llama"]().eval().save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_that_of_the_model_in_memory(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "whole", max_shard_size="30KB")
    x = {"pixel_values": torch.randn(1, 3, 32, 32)} if name == "vit" else IDS
    plan = graphprune.shrink_folder(tmp_path / "whole", tmp_path / "small", 0.4, shard_bytes=8_000)
    assert plan.slots == graphprune.trace(model, x).plan(0.4).slots
    found = graphprune.from_pretrained(tmp_path / "small")
    wanted = graphprune.rebuild(model, plan)
    with torch.no_grad():
        assert torch.equal(found(**x).logits, wanted(**x).logits)


def test_what_a_folder_holds(llama):
    out = llama.parent / "small"
    graphprune.shrink_folder(llama, out, target={"params": 0.6}, shard_bytes=8_000)
    names = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "config.json", "graphprune_plan.json"} <= names
    assert not [n for n in names if n == "code.py" or n.startswith(".") or n.endswith(".part")]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {name for name in names if name.endswith(".safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2


def test_it_goes_on_where_it_was_interrupted(llama, monkeypatch):
    out, known, made = llama.parent / "small", streaming.write_shard, []

    def counted(path, *args):
        if len(made) == 2:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(path.name)
        known(path, *args)

    monkeypatch.setattr(streaming, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        graphprune.shrink_folder(llama, out, 0.4, shard_bytes=8_000)
    assert (out / STATE).is_file()
    assert not (out / "config.json").exists()
    with pytest.raises(InputError, match="unfinished folder of another call"):
        graphprune.shrink_folder(llama, out, 0.5, shard_bytes=8_000)
    graphprune.shrink_folder(llama, out, 0.4, shard_bytes=8_000)
    assert len(set(made)) == len(made)  # none twice
    assert not (out / STATE).exists()
    graphprune.from_pretrained(out)


def test_a_full_disk_is_told_before_anything_is_written(llama, monkeypatch):
    usage = shutil.disk_usage(llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="make room"):
        graphprune.shrink_folder(llama, llama.parent / "small", 0.4)
    assert not [*(llama.parent / "small").iterdir()]


def test_nothing_is_overwritten(llama):
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    with pytest.raises(InputError, match="is the folder itself"):
        graphprune.shrink_folder(llama, llama, 0.4)
    with pytest.raises(InputError, match="lies in"):
        graphprune.shrink_folder(llama, llama / "inside", 0.4)
    for size in (0, -1, "2GB", float("nan")):
        with pytest.raises(InputError, match="shard_bytes must be a positive int"):
            graphprune.shrink_folder(llama, llama.parent / "out", 0.4, shard_bytes=size)
    (llama.parent / "letter").write_text("dear")
    with pytest.raises(CheckpointError, match="cannot write"):
        graphprune.shrink_folder(llama, llama.parent / "letter" / "out", 0.4)
    other = llama.parent / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is not empty"):
        graphprune.shrink_folder(llama, other, 0.4)
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def test_what_needs_the_model_in_memory_is_refused(llama):
    out = llama.parent / "small"
    with pytest.raises(InputError, match="takes no data"):
        graphprune.shrink_folder(llama, out, 0.4, criterion="wanda", data=[IDS])
    with pytest.raises(InputError, match="changes values"):
        graphprune.shrink_folder(llama, out, 0.4, exact_only=True)
    graphprune.shrink_folder(llama, out, 0.4)
    with pytest.raises(InputError, match="small model already"):
        graphprune.shrink_folder(out, llama.parent / "smaller", 0.4)
    assert not (llama.parent / "smaller").exists()


def test_weights_that_files_hold_in_another_form(tmp_path, monkeypatch):
    """Such as experts one by one, which the class stacks."""
    torch.manual_seed(0)
    MODELS["bert"]().save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(streaming.Shards, "_look_into", without_classifier(streaming.Shards))
    with pytest.raises(CheckpointError, match=r"missing: classifier.*load the model, which may"):
        graphprune.shrink_folder(tmp_path / "whole", tmp_path / "small", 0.4)
    assert not (tmp_path / "small").exists()


def without_classifier(kind):
    """As if files called it otherwise."""
    known = kind._look_into

    def look_into(self, file):
        known(self, file)
        self.files = {name: f for name, f in self.files.items() if "classifier" not in name}

    return look_into


def test_the_command(llama):
    out = llama.parent / "small"
    command = ["shrink", f"hf:{llama}", "--target", "params=0.7", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["verified"] is None
    plan = found["plan"]["plan"]
    assert plan["after"]["params"] <= 0.7 * plan["before"]["params"]
    done = CliRunner().invoke(app, [*command, "--report", str(llama.parent / "report.html")])
    assert done.exit_code == 2
    assert "--report needs the model in memory" in done.output
