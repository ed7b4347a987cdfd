# The studies' recipe for two CPU cores: 0.6 million parameters, 6 million bytes of Python's
# standard library a run. As it stands it trains the baseline; python -m study.ablate sets the arm,
# the rate and the seed. A run takes about 12 minutes on one core of an AMD EPYC (AVX2), beside
# another run, and 6 on an Intel Xeon's (AVX-512).

dataset = "stdlib"  # as bytes; prepared on first use
query_mode = "linear"
n_layer, n_head, n_embd, block_size = 3, 2, 128, 256  # heads are 64 wide, as GPT-3 small's
batch_size, gradient_accumulation_steps = 16, 1

learning_rate, lr_schedule = 5.66e-3, "linear"
warmup_iters, max_iters = 200, 1500
beta2 = 0.95

eval_interval = 1500  # once the decay has finished, on all of val.bin
log_interval = 10
dtype, compile = "float32", False  # on every machine, so that runs on different ones compare
