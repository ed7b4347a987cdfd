# The study on two CPU cores: a model of 0.8 million parameters, 2 million bytes of Python's standard library a run, so
# that a run takes minutes and the arms can be compared at their own best rates, over seeds. As it stands it trains the
# baseline; python -m study.ablate sets the arm, the rate and the seed. A run took 4:30 to 6:50 on one core of an AMD EPYC
# (AVX2). What was found, and why this recipe is not to be used again as it stands, is in study/README.md.

dataset = "stdlib"  # as bytes; prepared on first use
query_mode = "linear"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 128
batch_size, gradient_accumulation_steps = 12, 1

learning_rate, lr_schedule = 4e-3, "linear"
warmup_iters, max_iters = 80, 1300
beta2 = 0.99

eval_interval, eval_tokens = 1300, 262_144  # once the decay has finished
log_interval = 20
dtype = "float32"  # on every machine, so that runs on different ones can be compared
