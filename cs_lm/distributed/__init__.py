"""Several processes train one model: they join, sum their gradients, and share the optimizer.

Nothing here knows runs, checkpoints or configs. Read launch.py first, then ranks.py, parts.py and
sharing.py, the interface of the ways to share: data_parallel.py, sharded_moments.py and
fully_sharded.py; and model_parallel.py with pipeline.py, which cut a model before one of these
shares it, on the ranks of grid.py. sharded_optimizer.py and sharded_module.py are for training
loops of one's own.
"""
