"""Frozen audio encoders, one file each; their names are in ``registry.py``."""
