"""How good a trained model is: perplexity, and answers to tasks.

Nothing here changes a weight.
Read `perplexity` first, then `scoring` (token by token).
"""
