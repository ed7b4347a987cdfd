# GPT-3 medium with a linear query: shape and rate of GPT-3's table 2.1 (arXiv:2005.14165); batch,
# steps and hardware of config/gpt3_small.py. We know of no published result, and have not run it.

from config.gpt3_small import *  # noqa: F403

n_layer, n_head, n_embd = 24, 16, 1024
learning_rate = 3e-4
min_lr = 3e-5
