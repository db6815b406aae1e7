"""The feature store and the views training has of it."""
