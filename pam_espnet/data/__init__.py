"""Kaldi-style tables, audio reading, validation, passports and the feature cache."""
