"""Converters from other packages' weight formats to safetensors; run once, by recipes."""
