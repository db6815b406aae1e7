"""Handing a model on: export, model card, hub."""
