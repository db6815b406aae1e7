"""Sweeps: search space, cross-validated trials, weight interpolation."""
