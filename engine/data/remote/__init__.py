"""Data in buckets: requests with retries, the cache of ranges on disk, and the store over both."""
