"""Tar shards: index, random access, samples, writing."""
