"""Data sets on disk: beton files and tar shards, their sidecars, and how both are written and read."""
