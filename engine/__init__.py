"""The training engine: towers, projections, loss, loop, checkpoints, log."""
