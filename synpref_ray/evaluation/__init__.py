"""Measuring reward models and labels: accuracies with their uncertainty. Numpy only."""
