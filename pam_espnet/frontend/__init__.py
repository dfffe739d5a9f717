"""The frontend: a waveform and a prompt vector in, audio embeddings of the LLM's width out."""
