"""One target for the coverage-guided fuzzer atheris; `tests.faults.fuzz` runs them all.

    python -m tests.faults.fuzz_target tokenizer|store|checkpoint FOLDER [libFuzzer's flags]

FOLDER keeps the inputs that reach new code, and begins with one that is well formed. Whatever the
input, reading it gives a result or one readable line: any other exception is a finding.
"""

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np
import torch

with atheris.instrument_imports(include=["cs_lm"]):
    from cs_lm.config.fields import from_json, validate_all
    from cs_lm.config.run import RunConfig
    from cs_lm.data.token_store import MemmapManager
    from cs_lm.optim.adamw import AdamW
    from cs_lm.storage import manifest
    from cs_lm.tokenizer import BPETokenizer
    from cs_lm.training.checkpoint import checkpoint_content, read_checkpoint

WORK = Path(tempfile.mkdtemp())


def tokenizer(data: bytes) -> None:
    """vocab.json and merges.txt, with a zero byte between them."""
    vocab, _, merges = data.partition(b"\0")
    (WORK / "vocab.json").write_bytes(vocab)
    (WORK / "merges.txt").write_bytes(merges)
    found = BPETokenizer.from_files(WORK / "vocab.json", WORK / "merges.txt", ["<|x|>"])
    if all(bytes([byte]) in found.vocab.values() for byte in range(256)):
        text = "the cat née 🙂<|x|> 1000"
        assert found.decode(found.encode(text)) == text


def store(data: bytes) -> None:
    """A manifest, whose checksum is made right where there is a place for it."""
    try:
        content = json.loads(data)
        if isinstance(content, dict):
            content.pop("checksum", None)
            content["checksum"] = manifest._checksum(content)
            data = json.dumps(content).encode()
            from_json(RunConfig, content.get("source", {}))
    except (ValueError, RecursionError):
        pass
    (WORK / "store").mkdir(exist_ok=True)
    (WORK / "store" / manifest.MANIFEST).write_bytes(data)
    (WORK / "store" / "chunk_00000.bin").write_bytes(bytes(20))
    found = MemmapManager(WORK / "store")
    found.verify()
    assert len(found.load_by_range(0, len(found))) == len(found)


def checkpoint(data: bytes) -> None:
    (WORK / "state.pt").write_bytes(data)
    content = read_checkpoint(WORK / "state.pt")
    config = content["extras"].get("config")
    if config is not None:
        validate_all(from_json(RunConfig, config))


def seeds() -> dict[str, bytes]:
    """A well-formed input for each target."""
    names = {f"<{byte}>": byte for byte in range(3)} | {"a": 97, "b": 98, "ab": 256}
    MemmapManager.save_as_memmap(["abcdefghij"], _Ten(), WORK / "seed", 10)
    model = torch.nn.Linear(2, 1)
    file = io.BytesIO()
    content = checkpoint_content(model, AdamW(model.parameters()), 1, config={"seed": 3})
    torch.save(content, file)
    return {
        "tokenizer": json.dumps(names).encode() + b"\0#version: 0.2\na b\n",
        "store": (WORK / "seed" / manifest.MANIFEST).read_bytes(),
        "checkpoint": file.getvalue(),
    }


class _Ten:
    vocab_size, fingerprint = 300, "ten"

    def safe_blocks(self, parts):
        return iter(parts)

    def encode_each(self, blocks):
        return (np.arange(len(block)) for block in blocks)


def reading(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        try:
            target(data)
        except (ValueError, FileNotFoundError) as error:
            assert str(error).strip(), "an error that says nothing"

    return read


TARGETS = {"tokenizer": tokenizer, "store": store, "checkpoint": checkpoint}

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "well_formed").write_bytes(seeds()[name])
    atheris.Setup([sys.argv[0], str(folder), *sys.argv[3:]], reading(TARGETS[name]))
    atheris.Fuzz()
