# GPT-3 small with a linear query: the baseline of the paper (arXiv:2603.13381), and the recipe that
# its other arms start from. 60,002 steps of 491,520 tokens are 29.5 billion tokens, 3.3 epochs of
# OpenWebText.
#
# It needs OpenWebText (python prepare_data.py openwebtext) and one or more data-centre GPUs; on
# several: torchrun --standalone --nproc_per_node=8 train.py config/gpt3_small.py. Out of memory?
# Halve batch_size and double gradient_accumulation_steps: the steps stay the same.
# To expect: validation loss 2.956 near the end, as the paper reports (v1). We have not run it to
# the end.

dataset = "openwebtext"
block_size = 1024
batch_size = 12
gradient_accumulation_steps = 40  # 12 x 40 sequences of 1024 tokens, shared by all GPUs

query_mode = "linear"
n_layer, n_head, n_embd = 12, 12, 768
vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64
dropout = 0.0
bias = False

learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
warmup_iters = 2000
max_iters = 60002
beta1, beta2 = 0.9, 0.95
grad_clip = 1.0
