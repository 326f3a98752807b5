"""Sizes at which tiles and cached parts are many, in tensors of a few numbers."""

import pytest

from cs_lm.ops import manual_backward as gradients
from cs_lm.ops import tiled_attention


@pytest.fixture(params=[1, 2, 100], ids=lambda heads: f"{heads}_heads_a_tile")
def small_tiles(monkeypatch, request):
    """Tiles of 4 queries and 2 keys, of so many heads; parts of 60 numbers."""
    monkeypatch.setattr(tiled_attention, "_LEAST_QUERIES", 4)
    monkeypatch.setattr(tiled_attention, "_MOST_QUERIES", 4)
    monkeypatch.setattr(tiled_attention, "_HEAD_SCORES", 8)
    monkeypatch.setattr(tiled_attention, "_CPU_TILE_SCORES", 8 * request.param)
    monkeypatch.setattr(gradients, "CACHE_NUMBERS", 60)
