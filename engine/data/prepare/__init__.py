"""Preparation of a data set: shards out of folders, tars and Parquet files."""
