"""Several processes train one model: they join, sum their gradients, and share the optimizer.

Nothing here knows runs, checkpoints or configs. Read launch.py first, then ranks.py,
data_parallel.py and sharded_optimizer.py.
"""
