"""The CLIP model: loading, freezing, towers, projections."""
