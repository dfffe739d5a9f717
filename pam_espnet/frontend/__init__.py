"""From a waveform and a prompt vector to audio embeddings of the LLM's width."""
