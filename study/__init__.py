# Comparing queries: many runs, each arm at its own best rate, and what was found; see README.md here.
