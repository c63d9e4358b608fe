"""Pools, sidecars and sets: immutable shards of Parquet under one workspace, on any file system that fsspec knows."""
