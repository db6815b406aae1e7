"""Rows to batches: sources, fetching, shards, decoding, prefetching, the feature store."""
