"""The LLM that answers: prompt layout, LoRA, stepping with a cache."""
