# The first run: a small GPT with a nonlinear query learns to write Python from the standard library's source.

dataset = "stdlib"
n_layer, n_head, n_embd, block_size = 2, 4, 128, 128
batch_size, gradient_accumulation_steps = 12, 1
max_iters, eval_interval, warmup_iters, learning_rate = 60, 20, 5, 4e-3
eval_tokens = 64000
