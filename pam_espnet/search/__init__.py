"""Search over an engine: tensors, no audio, files or tokenizers."""
