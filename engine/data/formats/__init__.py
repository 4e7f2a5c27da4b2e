"""File formats of data sets: shards of our own, and MDS."""
