"""Experiments as single files: packing them, and loading them on another machine."""
