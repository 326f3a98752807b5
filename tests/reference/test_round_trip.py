"""Exports of every architecture, with every kind of tokenizer, beside transformers."""

import json

import pytest
import torch

from cs_lm.config.model import GPT2Config, ModelConfig
from cs_lm.interop.export_weights import write_weights
from cs_lm.interop.import_weights import read_weights
from cs_lm.interop.tokenizers import read_tokenizer
from cs_lm.tokenizer import BPETokenizer, train_bpe
from tests.reference.test_weights import random_model
from tests.tolerances import OTHER_LIBRARY

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

V = 300
MODELS = {
    "gpt2": GPT2Config(24, 3, 40, V, 2, 32, drop_rate=0.1),
    "llama": ModelConfig(24, 3, 40, V, 2, 32, rope_theta=5000.0),
}
# Special tokens as people have them.
TOKENIZERS = {
    "end of text": ["<|endoftext|>"],
    "none": [],
    "another": ["<|done|>"],
    "not ASCII": ["<|endoftext|>", "<|ende\u00e9\u5317|>"],
    "white space": ["<|endoftext|>", "<a b>", "\n\n#"],
    "a Latin-1 character": ["<|endoftext|>", "\u00e9", "\u00ff"],
    "a byte or two": ["<|endoftext|>", "\n", "t ", "\n\n"],
    "the name of a space": ["\u0120", "\u0120t"],
}
TEXTS = [
    "the cat sat on a mat. caf\u00e9 \u5317\u4eac \U0001f642 1234  \n\n x",
    "\u0120 \u00c3\u00a9 \u00ff\u00ffz",
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat, the caf\u00e9. " * 30, encoding="utf-8")
    return train_bpe(path, 280)


def tokenizer_of(learnt, kind) -> BPETokenizer:
    vocab, merges = learnt
    return BPETokenizer(vocab, merges, TOKENIZERS[kind])


def texts_of(tokenizer):
    between = [f"the {token}cat{token}{token} {token}" for token in tokenizer.special_tokens]
    return [*TEXTS, *between]


@pytest.mark.parametrize("file_format", ["safetensors", "pytorch"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_round_trip(name, kind, file_format, learnt, tmp_path):
    ours, tokenizer = random_model(MODELS[name]), tokenizer_of(learnt, kind)
    folder = tmp_path / "out"
    write_weights(ours, tokenizer, folder, file_format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts_of(tokenizer):
        ids = tokenizer.encode(text)
        assert their_tokenizer(text)["input_ids"] == ids, text
        assert their_tokenizer.decode(ids) == text
        expected = ours(torch.tensor([ids[:32]]))
        actual = theirs(torch.tensor([ids[:32]])).logits
        torch.testing.assert_close(actual, expected, **OTHER_LIBRARY)
    _padded_batches_work(ours, tokenizer, theirs, their_tokenizer)
    end = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    ends = [] if end is None else end if isinstance(end, list) else [end]
    assert [tokenizer.vocab[i].decode() for i in ends] == tokenizer.end_tokens
    write = transformers.pipeline("text-generation", model=theirs, tokenizer=their_tokenizer)
    written = write("the cat", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert written.startswith("the cat")
    back = read_tokenizer(folder)
    assert back.end_tokens == tokenizer.end_tokens
    for text in texts_of(tokenizer):
        assert back.encode(text) == tokenizer.encode(text)
    same = read_weights(folder)
    for (one, a), (two, b) in zip(ours.named_parameters(), same.named_parameters(), strict=True):
        assert one == two and torch.equal(a, b)


def _padded_batches_work(ours, tokenizer, theirs, their_tokenizer):
    """A short row among longer ones has the scores that it has alone."""
    batch = their_tokenizer(["a cat", "the cat sat on the mat"], padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    scores = theirs(**batch, position_ids=positions).logits[0, -1]
    expected = ours(torch.tensor([tokenizer.encode("a cat")]))[0, -1]
    torch.testing.assert_close(scores, expected, **OTHER_LIBRARY)
    assert batch["input_ids"].max() < V, "no id outside the model"


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saved_again_comes_back(name, learnt, tmp_path):
    """The most usual way: exported, fine-tuned there, imported. It writes a template of nothing."""
    ours, tokenizer = random_model(MODELS[name]), tokenizer_of(learnt, "end of text")
    write_weights(ours, tokenizer, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    their_tokenizer(["a cat", "the cat sat"], padding=True, truncation=True, max_length=3)
    theirs.save_pretrained(tmp_path / "again")
    their_tokenizer.save_pretrained(tmp_path / "again")
    back = read_tokenizer(tmp_path / "again")
    for text in texts_of(tokenizer):
        assert back.encode(text) == tokenizer.encode(text)
    for (_, a), (_, b) in zip(
        ours.named_parameters(), read_weights(tmp_path / "again").named_parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_openai_s_layout_has_its_tokenizer_too(learnt, tmp_path):
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    tokenizer = tokenizer_of(learnt, "end of text")
    write_weights(random_model(MODELS["gpt2"]), tokenizer, tmp_path / "out", "tensorflow")
    assert read_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


# ---- tokenizers of other programs, in ----


def saved_pair(folder, specials=()):
    tokenizer = BPETokenizer({i: bytes([i]) for i in range(256)}, [], specials)
    tokenizer.save(folder / "vocab.json", folder / "merges.txt")


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def test_every_file_that_names_tokens_is_honoured(tmp_path):
    saved_pair(tmp_path, ["<|endoftext|>"])
    write(tmp_path / "added_tokens.json", {"<|a|>": 257})
    write(
        tmp_path / "special_tokens_map.json",
        {
            "eos_token": "<|endoftext|>",
            "pad_token": {"content": "<|b|>"},
            "additional_special_tokens": ["<|a|>"],
        },
    )
    write(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": {"258": {"content": "<|b|>", "special": True}}},
    )
    write(tmp_path / "config.json", {"eos_token_id": [257, 256, 50256]})
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("x<|a|><|b|><|endoftext|>") == [120, 257, 258, 256]
    assert tokenizer.end_tokens == ["<|a|>", "<|endoftext|>"]
    write(tmp_path / "generation_config.json", {"eos_token_id": 258})
    assert read_tokenizer(tmp_path).end_tokens == ["<|b|>"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"<|a|>": 97}, "gives '<|a|>' the id 97, which is that of b'a'"),
        ("added_tokens.json", {"<|endoftext|>": 9}, "the id 9, and the vocabulary 256"),
        ("added_tokens.json", {"<|a|>": "x"}, "gives '<|a|>' no id"),
        ("special_tokens_map.json", {"pad_token": "[PAD]"}, "names the token '[PAD]', which the"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "has add_prefix_space; need none"),
        ("tokenizer_config.json", {"add_bos_token": True}, "has add_bos_token; need none"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"256": {"content": "<|endoftext|>", "lstrip": True}}},
            "has lstrip for '<|endoftext|>'; need none",
        ),
    ],
)
def test_what_we_would_do_otherwise_is_refused_by_name(file, content, message, tmp_path):
    saved_pair(tmp_path, ["<|endoftext|>"])
    write(tmp_path / file, content)
    with pytest.raises(ValueError) as error:
        read_tokenizer(tmp_path)
    assert message in str(error.value)


def test_ordinary_text_that_ends_a_text_stays_ordinary(tmp_path):
    """A model that stops at a newline: its prompts are encoded as ever."""
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"\n\n"}
    tokenizer = BPETokenizer(vocab, [(b"\n", b"\n")])
    tokenizer.save(tmp_path / "vocab.json", tmp_path / "merges.txt")
    write(tmp_path / "generation_config.json", {"eos_token_id": 10})
    read = read_tokenizer(tmp_path)
    assert read.encode("a\n\n\nb") == [97, 256, 10, 98] and read.end_tokens == ["\n"]
    write_weights(random_model(MODELS["gpt2"]), read, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("a\n\n\nb")["input_ids"] == [97, 256, 10, 98]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 10
    assert read_tokenizer(tmp_path / "out").end_tokens == ["\n"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"eos_token_id": [[1]]}, "eos_token_id in config.json .* is ..1.."),
        ("config.json", {"eos_token_id": 200}, "names a token that is a part of a character"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}, "has 5 for 'x'; need tok"),
        ("tokenizer_config.json", {"added_tokens_decoder": [5]}, "need tokens with their content"),
    ],
)
def test_files_of_another_make_are_named(file, content, message, tmp_path):
    saved_pair(tmp_path)
    write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)


def test_a_tokenizer_json_decides(learnt, tmp_path):
    tokenizer = tokenizer_of(learnt, "another")
    write_weights(random_model(MODELS["gpt2"]), tokenizer, tmp_path / "out")
    saved_pair(tmp_path / "out")
    assert read_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    write(tmp_path / "out" / "tokenizer.json", {**content, "normalizer": {"type": "NFC"}})
    with pytest.raises(ValueError, match="has normalizer NFC, need none"):
        read_tokenizer(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_causal_masks_of_any_type_are_no_weights(dtype, tmp_path):
    ours = random_model(MODELS["gpt2"])
    write_weights(
        ours, BPETokenizer({i: bytes([i]) for i in range(256)}, []), tmp_path / "out", "pytorch"
    )
    path = tmp_path / "out" / "pytorch_model.bin"
    state = torch.load(path)
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=dtype)
    torch.save(state, path)
    for (_, a), (_, b) in zip(ours.named_parameters(), read_weights(path).named_parameters()):
        assert torch.equal(a, b)


def test_dropout_rates_that_differ_are_refused(tmp_path):
    write_weights(random_model(MODELS["gpt2"]), BPETokenizer({0: b"a"}, []), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    write(path, {**content, "attn_pdrop": 0.0})
    with pytest.raises(ValueError, match="rates of .* differ .resid_pdrop 0.1, embd_pdrop 0.1, at"):
        read_weights(tmp_path / "out")


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_nanogpt_s_checkpoint(bias, tmp_path):
    """As it writes it: products from the left, names of a compiled model, its settings inside."""
    ours = random_model(MODELS["gpt2"])
    if not bias:
        for name, parameter in ours.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    write_weights(ours, BPETokenizer({0: b"a"}, []), tmp_path / "out", "pytorch")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin")
    theirs = {"_orig_mod.lm_head.weight": state["transformer.wte.weight"]}
    for name, x in state.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            x = x.T.contiguous()
        if bias or not name.endswith(".bias"):
            theirs[f"_orig_mod.{name}"] = x
    arguments = {
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 24,
        "block_size": 32,
        "bias": bias,
        "vocab_size": V,
        "dropout": 0.0,
    }
    # nanoGPT's feed-forward layers are always four times as wide
    wide = GPT2Config(24, 3, 96, V, 2, 32)
    wider = random_model(wide)
    for i in range(2):
        for one, two in (("c_fc", "w1"), ("c_proj", "w2")):
            layer = getattr(wider.layers[i].ffn, two)
            theirs[f"_orig_mod.transformer.h.{i}.mlp.{one}.weight"] = layer.weight.clone()
            theirs.pop(f"_orig_mod.transformer.h.{i}.mlp.{one}.bias", None)
            if bias:
                theirs[f"_orig_mod.transformer.h.{i}.mlp.{one}.bias"] = layer.bias.clone()
    content = {
        "model": theirs,
        "optimizer": {"state": {}},
        "model_args": arguments,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"x": "y"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    read = read_weights(tmp_path / "ckpt.pt")
    assert read.config == GPT2Config(24, 3, 96, V, 2, 32, drop_rate=0.0)
    expected = dict(ours.named_parameters())
    for name, parameter in read.named_parameters():
        if "ffn" not in name:
            assert torch.equal(parameter, expected[name]), name
        elif name.endswith("weight"):
            assert torch.equal(parameter, dict(wider.named_parameters())[name]), name
        elif not bias:
            assert not parameter.any(), name
    assert read_weights(tmp_path).config == read.config, "its folder will do"
    arguments["n_head"] = 5
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="do not fit: --num_heads: got 5, need a divisor"):
        read_weights(tmp_path / "ckpt.pt")
