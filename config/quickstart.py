# The first run: a small GPT with a nonlinear query learns to write Python from its own standard library.
# Needs no GPU and no network. Two cores of an AMD EPYC (AVX2), torch 2.14.1: 1:22, validation loss 1.470
# (the text depends on the version of Python; 3.11.7 there).

dataset = "stdlib"  # as bytes; prepared on first use
query_mode = "nonlinear"
n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
batch_size, gradient_accumulation_steps = 12, 1

learning_rate, lr_schedule = 1e-2, "linear"  # small models like high rates
warmup_iters, max_iters = 80, 1600
beta2 = 0.99

eval_interval, eval_tokens = 400, 100_000
log_interval = 50
dtype, compile = "float32", False  # so small a model gains nothing from bfloat16 or a compiler
