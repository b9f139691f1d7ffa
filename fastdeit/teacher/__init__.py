"""The teacher, and its labels stored ahead of a run."""
