"""The check of a dataset before any GPU time."""
