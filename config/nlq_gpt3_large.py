# GPT-3 large with the nonlinear query, as the audit that config/gpt3_large.py names ran it: the
# parameters (+73,728 gains), batches and steps of that file. To expect: validation loss 2.5464 to
# 2.5487 over three orders of the data, as it reports. It tried no other rate, while linear with
# QK-norm, at the best of four rates, reached 2.5403. We have not run it.

from config.gpt3_large import *  # noqa: F403

query_mode = "nonlinear"
learning_rate = 2.55e-3
min_lr = 2e-5
