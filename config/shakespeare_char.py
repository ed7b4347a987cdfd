# Tiny Shakespeare by characters, sized for two minutes on two CPU cores.

dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 2, 4, 128, 64
batch_size, gradient_accumulation_steps = 24, 1

learning_rate, lr_schedule = 1e-2, "linear"
warmup_iters, max_iters = 80, 1550
beta2 = 0.99

eval_interval = 775
log_interval = 50
