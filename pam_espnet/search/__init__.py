"""Search over a decoder: knows tensors and a decoder, nothing of audio, files or tokenizers."""
