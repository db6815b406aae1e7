"""Training on shards as a stream: composable stages from tars to batches, in memory that does not grow with them."""
