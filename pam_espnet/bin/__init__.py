"""Command lines: each module parses arguments and calls one function of a lower layer."""
