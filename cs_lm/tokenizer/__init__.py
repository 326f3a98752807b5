"""Byte-pair encoding (BPE): the definition, a fast version, training, file formats of other tools.

No torch. This package does not depend on models or runs.
Read `bpe` first: it is the definition. `pretokenizer` cuts text into words, `tokenizer` has
`BPETokenizer`, `training` has `train_bpe`. These files make them fast: `pair_index` and `fast_bpe`
(training), `merge_table`, `word_encoder`, `word_table`, `word_boundaries`, `long_words`
(encoding), `word_counts`, `parallel_encode`, `worker_pool` (several processes). Texts come from
`text_source`, `corpus_files`, `json_texts`. Formats: `gpt2_files`, `byte_encoder`, `formats`.
"""

from cs_lm.tokenizer.tokenizer import BPETokenizer
from cs_lm.tokenizer.training import train_bpe

__all__ = ["BPETokenizer", "train_bpe"]
