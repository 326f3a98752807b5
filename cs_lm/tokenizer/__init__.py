"""Byte-pair encoding: the definition, its fast twin, training, and the file formats of others.

No torch. Nothing here knows a model or a run.
Read `bpe` first: it is the definition. `pretokenizer` cuts text into words, `tokenizer` has
`BPETokenizer`, `training` has `train_bpe`. What makes them fast: `pair_index` and `fast_bpe`
(training), `merge_table`, `word_encoder`, `word_table`, `word_boundaries`, `long_words`
(encoding), `word_counts`, `parallel_encode`, `worker_pool` (several processes). Texts come from
`text_source`, `corpus_files`, `json_texts`. Formats: `gpt2_files`, `byte_encoder`, `formats`.
"""

from cs_lm.tokenizer.tokenizer import BPETokenizer
from cs_lm.tokenizer.training import train_bpe

__all__ = ["BPETokenizer", "train_bpe"]
