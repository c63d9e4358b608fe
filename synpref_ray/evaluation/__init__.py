"""Measuring reward models, labels, judges and taggers: shares with their uncertainty. Numpy and scikit-learn only."""
