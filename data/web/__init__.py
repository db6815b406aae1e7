"""The network: fetcher, address guard, downloads, remote shards."""
