"""Folders of timm, diffusers and sentence-transformers, and the doors for all."""

import json
import shutil
import warnings

import pytest
import torch
from torch import nn

import graphprune
from graphprune.deploy.folders.files import check_builds, placed, read, write
from graphprune.errors import CheckpointError, InputError, ModelError, PruningWarning


@pytest.fixture(autouse=True)
def _quiet():
    """What libraries say of themselves depends on their versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- one file with the plan, without any library ----------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


X = torch.randn(3, 4)


@pytest.fixture
def folder(tmp_path):
    small = graphprune.rebuild(net(), 0.5)
    (tmp_path / "config.json").write_text(json.dumps({"of": "the library"}))
    write(small, tmp_path, "weights.safetensors", "graphprune")
    return small, tmp_path


def test_the_config_names_the_file(folder):
    small, path = folder
    config = json.loads((path / "config.json").read_text())
    assert config["of"] == "the library"
    assert torch.equal(read(path, config["graphprune"], net)(X), small(X))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "names no weights"),
        ({"format": 1}, "names no weights"),
        ({"format": 9, "weights": "weights.safetensors"}, "this graphprune reads 1"),
        ({"format": 1, "weights": "../weights.safetensors"}, "a file of another folder"),
        ({"format": 1, "weights": "gone.safetensors"}, "cannot read"),
    ],
)
def test_entries_of_strangers(entry, said, folder):
    with pytest.raises(CheckpointError, match=said):
        read(folder[1], entry, net)


def test_what_is_built_must_be_the_original(folder):
    small, _ = folder
    check_builds(small, net, "")
    with pytest.raises(ModelError, match="another model than was pruned: pass it"):
        check_builds(small, lambda: nn.Linear(4, 8), "pass it")
    with pytest.raises(ModelError, match="builds no model"):
        check_builds(small, lambda: 1 / 0, "")
    with pytest.raises(InputError, match="without a graphprune_plan"):
        check_builds(net(), net, "")


def test_dtypes_and_devices():
    model = placed(net(), {"torch_dtype": torch.float64, "device_map": "cpu"})
    assert model[0].weight.dtype == torch.float64
    assert placed(net(), {"dtype": "auto", "low_cpu_mem_usage": True})[0].weight.is_cpu
    with pytest.raises(InputError, match="unknown options: revision"):
        placed(net(), {"revision": "main"})
    with pytest.raises(InputError, match="one device"):
        placed(net(), {"device_map": {"": "cpu"}})


def test_models_of_no_library(tmp_path):
    with pytest.raises(InputError, match=r"no library that has folders.*graphprune\.save"):
        graphprune.save_pretrained(graphprune.rebuild(net(), 0.5), tmp_path)


# --- timm -------------------------------------------------------------------------------------


def test_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    small = graphprune.rebuild(model, 0.4, x, scope="global")
    path = graphprune.save_pretrained(small, tmp_path / "small")
    assert {p.name for p in path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = graphprune.from_pretrained(path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x), small(x))
    half = graphprune.from_pretrained(path, dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        graphprune.from_pretrained(path)
    timm.models.save_for_hf(model, str(tmp_path / "plain"), safe_serialization=True)
    assert torch.equal(graphprune.from_pretrained(tmp_path / "plain")(x), model(x))


def test_timm_changed_by_hand(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("resnet10t", num_classes=5).eval()
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 5))
    small = graphprune.rebuild(model, 0.4, torch.randn(2, 3, 32, 32))
    with pytest.raises(ModelError, match="pass model_args"):
        graphprune.save_pretrained(small, tmp_path / "small")
    assert not list((tmp_path / "small").iterdir())


# --- diffusers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([3])}
    small = graphprune.rebuild(model, 0.4, x, scope="global")
    small.save_pretrained(tmp_path / "unet")
    loaded = graphprune.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=True)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(**x).sample, small(**x).sample)
    plain = type(model).from_pretrained(tmp_path / "unet")
    assert torch.equal(plain(**x).sample, small(**x).sample)
    assert "quantization_config" not in plain.config
    assert type(model).from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16).dtype == (
        torch.bfloat16
    )
    again = shutil.copytree(tmp_path / "unet", tmp_path / "again")
    loaded.save_pretrained(again)
    assert torch.equal(graphprune.from_pretrained(again)(**x).sample, small(**x).sample)
    pipeline = diffusers.DDPMPipeline(small, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    found = graphprune.from_pretrained(tmp_path / "pipeline")
    assert type(found) is diffusers.DDPMPipeline
    assert torch.equal(found.unet(**x).sample, small(**x).sample)
    found = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert torch.equal(found.unet(**x).sample, small(**x).sample)
    with pytest.raises(InputError, match="no variants"):
        small.save_pretrained(tmp_path / "unet", variant="fp16")
    path = tmp_path / "unet" / "config.json"
    path.write_text(path.read_text().replace("UNet2DModel", "os"))
    with pytest.raises(ModelError, match="os is no class of diffusers"):
        graphprune.from_pretrained(tmp_path / "unet")


# --- sentence-transformers --------------------------------------------------------------------


@pytest.mark.slow
def test_sentence_transformers(tmp_path):
    sentences = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    plain = tmp_path / "plain"
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(plain)
    letters = [chr(97 + n) for n in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (plain / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(plain / "vocab.txt")).save_pretrained(plain)
    model = sentences.SentenceTransformer(str(plain), device="cpu").eval()
    ids = torch.randint(5, 60, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    graph = graphprune.trace(model, (dict(inputs),), outputs="sentence_embedding")
    with pytest.warns(PruningWarning, match=r"BertModel.*writes the plan beside it"):
        small = graphprune.rebuild(model, graph.plan(0.4, scope="global"), (dict(inputs),))
    small.save_pretrained(str(tmp_path / "small"))
    wanted = small(dict(inputs))["sentence_embedding"]
    held = dict(transformers.AutoModel._model_mapping._extra_content)
    loaded = graphprune.from_pretrained(tmp_path / "small", device="cpu")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(dict(inputs))["sentence_embedding"], wanted)
    assert transformers.AutoModel._model_mapping._extra_content == held, "nothing is left behind"
    remote = sentences.SentenceTransformer(
        str(tmp_path / "small"), device="cpu", trust_remote_code=True
    )
    assert torch.equal(remote(dict(inputs))["sentence_embedding"], wanted)
