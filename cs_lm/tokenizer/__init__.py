"""Byte-pair encoding without torch: training, encoding, decoding, GPT-2's file formats."""

from cs_lm.tokenizer.tokenizer import BPETokenizer
from cs_lm.tokenizer.training import train_bpe

__all__ = ["BPETokenizer", "train_bpe"]
