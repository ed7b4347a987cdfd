# GPT-3 medium with the nonlinear query: the parameters (+49,152 gains), batches and steps of
# config/gpt3_medium.py. The rate is a guess between the published ones for small (3.6e-3) and large
# (2.55e-3). We know of no published result, and have not run it.

from config.gpt3_medium import *  # noqa: F403

query_mode = "nonlinear"
learning_rate = 3e-3
min_lr = 2e-5
