"""The feature store, and the feature tables that training reads from it."""
