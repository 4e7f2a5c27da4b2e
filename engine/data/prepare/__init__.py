"""Making a data set of shards from folders, tars and Parquet files."""
