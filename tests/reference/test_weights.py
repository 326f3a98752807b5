"""Weights in and out beside transformers: the same scores, from every layout and to every one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.config.run import named_run
from cs_lm.interop.export_weights import write_weights
from cs_lm.interop.import_weights import read_weights
from cs_lm.interop.tokenizers import read_tokenizer
from cs_lm.models.registry import build_model
from cs_lm.tokenizer import BPETokenizer, train_bpe
from tests.tolerances import OTHER_LIBRARY

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

V = 300
SMALL = GPT2Config(24, 3, 40, V, 2, 32, drop_rate=0.1)
LLAMA = ModelConfig(24, 3, 40, V, 2, 32, rope_theta=5000.0)
MODELS = {
    "gpt2": SMALL,
    "untied": GPT2Config(24, 3, 40, V, 2, 32, tied_head=False),
    "no qkv_bias": GPT2Config(24, 3, 40, V, 2, 32, qkv_bias=False),
    "llama": LLAMA,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat, the cat ran. " * 30, encoding="utf-8")
    vocab, merges = train_bpe(path, 280, ["<|endoftext|>"])
    return BPETokenizer(vocab, merges, ["<|endoftext|>"])


def random_model(config, seed=3):
    """Weights larger than at the start, biases and gains too, so that all of them show."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(config, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.02 if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model.eval()


def ids_of(config):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, config.vocab_size, (2, 13), generator=generator)


@torch.no_grad()
def same_scores(ours, theirs):
    ids = ids_of(ours.config)
    torch.testing.assert_close(ours.eval()(ids), theirs.eval()(ids).logits, **OTHER_LIBRARY)


def assert_same_weights(one, two):
    for (name, a), (other, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b), name


def their_gpt2(config=SMALL, seed=5, **changes):
    torch.manual_seed(seed)
    settings = {
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "n_inner": config.d_ff,
        "n_positions": config.context_length,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        **changes,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


# ---- out ----


@pytest.mark.parametrize("file_format", ["safetensors", "pytorch"])
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_write(name, shard_bytes, file_format, tokenizer, tmp_path):
    ours = random_model(MODELS[name])
    write_weights(ours, tokenizer, tmp_path / "out", file_format, shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same_scores(ours, theirs)
    if shard_bytes is not None:
        assert len(list((tmp_path / "out").glob("*-of-*"))) > 2
    back = read_weights(tmp_path / "out")
    if name == "no qkv_bias":  # they come back as biases of zeros
        same_scores(back, theirs)
    else:
        assert back.config == MODELS[name] and not list(tmp_path.glob("*.writing"))
        assert_same_weights(back, ours)


def test_the_tokenizer_comes_along(tokenizer, tmp_path):
    write_weights(random_model(SMALL), tokenizer, tmp_path / "out")
    assert read_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    text = "the cat<|endoftext|> sat on a mat"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == tokenizer.encode(text)


# ---- in ----


@pytest.mark.parametrize(
    "size",
    ["gpt2-small", "gpt2-medium",
     *(pytest.param(size, marks=pytest.mark.slow) for size in ("gpt2-large", "gpt2-xl"))],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_each_size_has_their_scores(size, tied, tmp_path):
    """Real widths and heads; two layers and few tokens for the sake of memory."""
    wide = named_run(size).model
    config = GPT2Config(
        wide.d_model, wide.num_heads, wide.d_ff, 997, 2, wide.context_length, tied_head=tied
    )
    theirs = their_gpt2(config)
    theirs.save_pretrained(tmp_path)
    same_scores(read_weights(tmp_path), theirs)


def test_shards_of_theirs(tmp_path):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same_scores(read_weights(tmp_path), theirs)


@pytest.mark.parametrize("old", [False, True])
def test_files_of_torch_save(old, tmp_path):
    """Also as torch wrote them before version 1.6; without a prefix, and with causal masks."""
    theirs = their_gpt2()
    theirs.config.save_pretrained(tmp_path)
    state = {n.removeprefix("transformer."): x for n, x in theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    del state["lm_head.weight"]
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    same_scores(read_weights(path), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    theirs = their_gpt2().to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = read_weights(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    same_scores(ours, theirs.float())


@pytest.mark.parametrize("tied", [True, False])
def test_llama_has_their_scores(tied, tmp_path):
    torch.manual_seed(2)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=24,
            num_attention_heads=3,
            num_key_value_heads=3,
            intermediate_size=40,
            vocab_size=V,
            num_hidden_layers=2,
            max_position_embeddings=32,
            rms_norm_eps=1e-4,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = read_weights(tmp_path)
    assert ours.config.rope_theta == 700.0 and ours.config.norm_eps == 1e-4
    same_scores(ours, theirs)


TENSORFLOW = """
import sys, torch
from cs_lm.interop.import_weights import read_weights
from tests.reference.test_weights import *
from pathlib import Path
config = GPT2Config(24, 3, 96, V, 2, 32)
ours, out = random_model(config), Path(sys.argv[1])
tokenizer = read_tokenizer(out / "tokenizer")
write_weights(ours, tokenizer, out / "tf", "tensorflow")
assert_same_weights(read_weights(out / "tf"), ours)
import tensorflow as tf
shapes = dict(tf.train.list_variables(str(out / "tf" / "model.ckpt")))
assert shapes["model/h1/attn/c_attn/w"] == [1, 24, 72] and shapes["model/ln_f/g"] == [24]
assert shapes["model/wpe"] == [32, 24] and len(shapes) == 2 * 12 + 4
assert read_tokenizer(out / "tf").fingerprint == tokenizer.fingerprint
"""


def test_tensorflow_round_trip(tokenizer, tmp_path):
    """In a process of its own: TensorFlow and torch do not always live in one."""
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    files = tmp_path / "tokenizer"
    tokenizer.save(files / "vocab.json", files / "merges.txt")
    command = [sys.executable, "-c", TENSORFLOW, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})


# ---- what does not fit ----


def test_all_that_does_not_fit_is_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    their_gpt2(GPT2Config(24, 3, 40, V, 4, 32)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for i in range(4):
        for kind in ("weight", "bias"):
            del state[f"transformer.h.{i}.ln_1.{kind}"], state[f"transformer.h.{i}.ln_2.{kind}"]
    state["transformer.h.0.attn.rotor"] = torch.zeros(3)
    state["transformer.wpe.weight"] = torch.zeros(33, 24)
    save_file(state, path)
    with pytest.raises(ValueError) as caught:
        read_weights(tmp_path)
    first, missing, unexpected, shapes = str(caught.value).splitlines()
    assert "does not fit" in first and str(tmp_path) in first
    assert missing.startswith("missing: 16: h.0.ln_1.bias, ") and missing.endswith(", ...")
    assert missing.count("h.") == 10
    assert unexpected == "unexpected: 1: h.0.attn.rotor"
    assert shapes == "of another shape: 1: transformer.wpe.weight [33, 24], need [32, 24]"


def changed(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type of .* is 'bert'; need one of gpt2, llama"),
        ({"activation_function": "relu"}, "activation_function of .* is 'relu'; need 'gelu_new'"),
        ({"n_embd": "wide"}, "n_embd of .* is 'wide', need int"),
        ({"n_head": 5}, "--num_heads: got 5, need a divisor"),
        ({"n_layer": 10**9}, "but it holds"),
        ({"n_embd": 3 * 10**9}, "but it holds"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon of .* is nan"),
    ],
)
def test_settings_of_another_model_are_refused(changes, message, tmp_path):
    their_gpt2().save_pretrained(tmp_path)
    changed(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_a_head_that_is_not_the_table_is_refused(tmp_path):
    their_gpt2(MODELS["untied"]).save_pretrained(tmp_path)
    changed(tmp_path / "config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight of .* is not the embedding"):
        read_weights(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    their_gpt2().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model.safetensors' cannot be read"):
        read_weights(tmp_path)
    path.unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}', encoding="utf-8")
    with pytest.raises(ValueError, match="names '../../etc/passwd', which is no file beside it"):
        read_weights(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02c__builtin__\neval\n.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin' cannot be read"):
        read_weights(tmp_path)


def test_what_openai_has_no_place_for_is_refused(tokenizer, tmp_path):
    for config in (MODELS["untied"], LLAMA, SMALL):
        with pytest.raises(ValueError, match="--format: tensorflow"):
            write_weights(random_model(config), tokenizer, tmp_path / "tf", "tensorflow")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_written_to(tokenizer, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="--to: .* exists already"):
        write_weights(random_model(SMALL), tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- more that is refused, each found once by somebody ----


def tampered(tmp_path, **changes):
    """A folder of transformers' GPT-2 whose state has been changed, as one file of torch.save."""
    theirs = their_gpt2()
    theirs.config.save_pretrained(tmp_path)
    state = {**theirs.state_dict(), **changes}
    del state["lm_head.weight"]
    path = tmp_path / "pytorch_model.bin"
    torch.save({name: x for name, x in state.items() if x is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wpe.weight": torch.zeros(32, 24)}, "has both transformer.wpe.weight and wpe.weight"),
        (
            {"transformer.wpe.weight": torch.zeros(32, 24, dtype=torch.int64)},
            "not of floating point: 1: transformer.wpe.weight",
        ),
        ({"extra": {"hidden": torch.zeros(3)}}, "holds more than tensors"),
        ({"transformer.wte.weight": torch.zeros(1).expand(V, 24)}, "holds more than tensors"),
        ({"transformer.wpe.weight": None}, "missing: 1: wpe.weight"),
    ],
)
def test_tensors_that_do_not_count_as_weights(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_weights(tampered(tmp_path, **changes))


def test_names_that_are_no_text(tmp_path):
    path = tampered(tmp_path)
    state = torch.load(path)
    torch.save({**state, 0: torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_weights(path)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_that_takes_memory_is_refused(hidden, tmp_path, monkeypatch):
    """Also where an archive behind it makes it look like another kind of file."""
    import pickle
    import zipfile

    path = tampered(tmp_path)
    pickled = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2)
    pickled += pickle.dumps({}, 2) + b"\x80\x02c__builtin__\nbytearray\nM\x10'\x85R."
    path.write_bytes(pickled + pickle.dumps([], 2))
    if hidden:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("x/none", "")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is unpickled"))
    with pytest.raises(ValueError, match=r"pytorch_model.bin' cannot be read"):
        read_weights(path)


def test_shards_that_hold_the_same_tensor_are_refused(tmp_path):
    import shutil

    their_gpt2().save_pretrained(tmp_path)
    for name in ("a", "b"):
        shutil.copy(tmp_path / "model.safetensors", tmp_path / f"{name}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match="is in another file too; need it once"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of .*; need None"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "need rope_type 'default'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads of .* is 1; need 3"),
        ({"rms_norm_eps": -1.0}, "norm_eps: got -1.0, need above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps of .* is 1000"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta of .* is 1000"),
        ({"max_position_embeddings": 10**9}, "1000000000"),
    ],
)
def test_settings_of_another_llama_are_refused(changes, message, tmp_path):
    from cs_lm.interop.layouts import read_config, written_config

    name, content = written_config("llama", LLAMA, [], None)
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert read_config(tmp_path).config == LLAMA
    changed(tmp_path / name, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_head_that_shares_memory_becomes_one_of_its_own(tmp_path):
    theirs = their_gpt2()
    theirs.config.tie_word_embeddings = False
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = read_weights(tmp_path)
    same_scores(ours, theirs)
    with torch.no_grad():
        ours.lm_head.weight.add_(1)
    assert not torch.equal(ours.lm_head.weight, ours.token_embeddings.weight)


def test_special_tokens_come_along(tmp_path):
    specials = ["<|endoftext|>", "<|user|>"]
    vocab = {i: bytes([i]) for i in range(256)}
    vocab.update((256 + i, text.encode("utf-8")) for i, text in enumerate(specials))
    tokenizer = BPETokenizer(vocab, [], specials)
    write_weights(random_model(SMALL), tokenizer, tmp_path / "out")
    back = read_tokenizer(tmp_path / "out")
    assert back.fingerprint == tokenizer.fingerprint
    text = "a<|user|>b"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back.encode(text) == theirs(text)["input_ids"] == [97, 257, 98]


def test_nothing_beside_an_export_is_touched(tokenizer, tmp_path):
    for name in ("e.old", "e.writing", ".e.x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "e").mkdir()  # an empty one may be used
    write_weights(random_model(SMALL), tokenizer, tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".e.x", "e", "e.old", "e.writing"]
    assert all((tmp_path / n / "mine").is_file() for n in ("e.old", "e.writing", ".e.x"))
    assert (tmp_path / "e").stat().st_mode & 0o777 == (tmp_path / "e.old").stat().st_mode & 0o777
