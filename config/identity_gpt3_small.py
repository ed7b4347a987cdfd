# GPT-3 small without W_Q: the query is x / 2. 7,077,888 parameters fewer in the attention layers than
# config/gpt3_small.py, which tells what it needs. The paper trained this arm with an untied head (38,633,472
# parameters more in the output layer) and less weight decay. Not run to the end here.

from config.gpt3_small import *  # noqa: F403

query_mode = "identity"
tie_weights = False
weight_decay = 2**-5
