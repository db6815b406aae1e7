"""The drawn demo dataset."""
