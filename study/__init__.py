# A tool that compares queries, each at its own best learning rate; see README.md here.
