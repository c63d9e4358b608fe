"""One thin script per thing a user runs."""
