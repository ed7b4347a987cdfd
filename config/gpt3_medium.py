# GPT-3 medium with a linear query: shape and rate of GPT-3's table 2.1 (arXiv:2005.14165), whose batch, 0.5 million
# tokens, is that of config/gpt3_small.py, which tells what it needs; as many steps. We know of no published result. Not
# run here.

from config.gpt3_small import *  # noqa: F403

n_layer, n_head, n_embd = 24, 16, 1024
learning_rate = 3e-4
min_lr = 3e-5
