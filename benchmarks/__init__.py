"""Benchmarks of the reward engine against what people use today, and against the limit of the machine; see README.md."""
