"""Fusions of several encoders into one stream: single, average, concat, static, pam."""
