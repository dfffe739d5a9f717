"""The LLM as decoding runs it."""
