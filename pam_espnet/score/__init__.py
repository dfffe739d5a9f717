"""Scores with their intervals, and the reports made of them."""
