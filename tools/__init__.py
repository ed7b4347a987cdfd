# Measuring speed, and importing checkpoints of other projects.
