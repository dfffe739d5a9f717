"""The LLM as training runs it."""
