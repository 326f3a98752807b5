"""How long a training step waits for its batch: prepared in a thread, and fetched when asked for.

    python -m benchmarks.batches [--rounds 5]

Two token stores: 10^6 ids, and 10^9 in sparse files (on a disk they take next to nothing; reading
them takes as many pages as reading any other). And what one window costs, beside mapping its file.
"""

import argparse
import functools
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Found, in_turns
from benchmarks.training import MODELS

NUM_STEPS = 30
NUM_WINDOWS = 2000
CHUNK = 1 << 26
SMALL = "0.82 M, B 12, T 64"


def sparse_store(folder: Path, num_tokens: int):
    """A store of zeros that takes no room: what `MemmapManager.save_as_memmap` would write."""
    from cs_lm.data.store_writer import id_dtype
    from cs_lm.data.token_store import FORMAT_VERSION, MemmapManager
    from cs_lm.storage.manifest import FileEntry, write_manifest

    vocab_size = 32_000
    width = id_dtype(vocab_size).itemsize
    files = []
    for first in range(0, num_tokens, CHUNK):
        name, num_bytes = f"chunk_{first // CHUNK:05d}.bin", width * min(CHUNK, num_tokens - first)
        with open(folder / name, "wb") as file:
            file.truncate(num_bytes)
        files.append(FileEntry(name, num_bytes, "0" * 64))
    facts = {
        "format_version": FORMAT_VERSION,
        "dtype": id_dtype(vocab_size).str,
        "num_tokens": num_tokens,
        "chunk_size": CHUNK,
        "vocab_size": vocab_size,
        "tokenizer_fingerprint": "none",
        "text_bytes": 4 * num_tokens,
        "source": {},
    }
    write_manifest(folder, files, facts)
    return MemmapManager(folder)


def waiting(num_tokens: int, is_prepared: bool):
    import torch

    from cs_lm.config.model import ModelConfig
    from cs_lm.data.batches import BatchSource
    from cs_lm.data.prefetch import Prefetcher
    from cs_lm.device import World
    from cs_lm.models.base import next_token_loss
    from cs_lm.models.transformer import TransformerLM

    sizes, batch_size, _ = MODELS[SMALL]
    model = TransformerLM(ModelConfig(**sizes))
    folder = tempfile.TemporaryDirectory()
    store = sparse_store(Path(folder.name), num_tokens)
    world = World(torch.device("cpu"))
    source = BatchSource(store, batch_size, sizes["context_length"], 0, "random", world)
    received = lambda copied: copied.received()  # noqa: E731
    batches = Prefetcher(source.copied, received) if is_prepared else source
    batches(0)

    def timed() -> Found:
        waited_s = 0.0
        start_s = time.perf_counter()
        for step in range(1, NUM_STEPS + 1):
            asked_s = time.perf_counter()
            batch = batches(step)
            waited_s += time.perf_counter() - asked_s
            next_token_loss(model, batch)[0].backward()
        share = waited_s / (time.perf_counter() - start_s)
        folder.cleanup()
        return Found(waited_us=1e6 * waited_s / NUM_STEPS, share_of_step=share)

    return timed


def windows(how: str):
    """Windows of 257 ids at random places of 10^9, each read on its own."""
    import numpy as np

    folder = tempfile.TemporaryDirectory()
    store = sparse_store(Path(folder.name), 10**9)
    starts = np.random.default_rng(0).integers(0, len(store) - 257, NUM_WINDOWS).tolist()

    def mapped(start: int, end: int) -> np.ndarray:
        chunk, offset = divmod(start, CHUNK)
        path = store.folder / store.files[chunk].name
        shape = (min(end - start, CHUNK - offset),)
        return np.array(np.memmap(path, store.dtype, "r", offset * store.dtype.itemsize, shape))

    read = store.load_by_range if how == "cs_lm" else mapped

    def timed() -> Found:
        start_s = time.perf_counter()
        for start in starts:
            read(start, start + 257)
        window_us = 1e6 * (time.perf_counter() - start_s) / NUM_WINDOWS
        folder.cleanup()
        return Found(window_us=window_us)

    return timed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    contestants = {}
    for num_tokens in (10**9, 10**6):
        for how in ("prepared", "when asked"):
            contestants[f"{num_tokens:.0e} tokens, {how}"] = functools.partial(
                waiting, num_tokens, how == "prepared"
            )
    ways = {how: functools.partial(windows, how) for how in ("cs_lm", "numpy.memmap")}
    in_turns("a window of 257 ids", ways, rounds)
    in_turns(f"waiting for a batch, {SMALL}", contestants, rounds, repeats=NUM_STEPS)


if __name__ == "__main__":
    main()
