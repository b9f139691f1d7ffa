"""Decoders, and the choice among them."""
