"""Packages on the Hugging Face hub: model cards, and sending one."""
