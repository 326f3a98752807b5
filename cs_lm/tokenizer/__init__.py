"""Byte-pair encoding without torch: training, encoding, decoding, GPT-2's file formats."""

from cs_lm.tokenizer.tokenizer import DEFAULT_SPECIAL_TOKENS, BPETokenizer, train_bpe

__all__ = ["DEFAULT_SPECIAL_TOKENS", "BPETokenizer", "train_bpe"]
