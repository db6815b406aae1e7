"""Metrics, retrieval and reports (import as `from eval.metrics import ...`: the name hides a builtin)."""
