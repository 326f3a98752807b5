"""Words and control tokens of the small instructions that several tests learn."""

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["cat", "dog", "bird", "fish", "horse", "mouse"]
WORDS += ["bear", "wolf", "lion", "deer", "frog", "goat"]
