"""Decoding of recordings and of data directories."""
