# GPT-3 small without W_Q: the query is x / 2. The attention layers have 7,077,888 parameters fewer
# than in config/gpt3_small.py, whose hardware it needs. The paper trained this arm with an untied
# head (38,633,472 more parameters) and less weight decay. We have not run it to the end.

from config.gpt3_small import *  # noqa: F403

query_mode = "identity"
tie_weights = False
weight_decay = 2**-5
