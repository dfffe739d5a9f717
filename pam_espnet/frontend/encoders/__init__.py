"""Frozen audio encoders, one file each; ``registry.py`` names them."""
