"""The demo's data: prompts over kinds of tasks that a program can check, sampled replies, pairs with known truth (examples/README.md)."""
