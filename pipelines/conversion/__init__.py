"""Conversion of a source into a data set, and its verification."""
