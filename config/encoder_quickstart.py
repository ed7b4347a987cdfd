# A small encoder on the standard library's source, as in the quickstart: 30 % of each sequence is
# masked, and predicted from both sides. Two minutes on two CPU cores. Fill in masks with it:
#   python sample.py out/encoder_quickstart --prompt="def __init__(se<mask><mask>, name):"

dataset = "stdlib"  # as bytes; prepared on first use
objective, mask_share = "masked", 0.3
query_mode = "nonlinear"
n_layer, n_head, n_embd, block_size = 2, 4, 128, 32
batch_size, gradient_accumulation_steps = 48, 1

learning_rate, lr_schedule = 1e-2, "linear"
warmup_iters, max_iters = 80, 2000
beta2 = 0.99

eval_interval, eval_tokens = 1000, 100_000
log_interval = 50
dtype, compile = "float32", False  # a model this small gains nothing from bfloat16 or a compiler
