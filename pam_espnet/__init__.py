"""Prompt-aware speech LLMs as ESPnet-style recipes.

Nothing heavy is imported here: ``import pam_espnet`` costs no torch, no transformers and no espnet.
"""

__version__ = "0.1.0"
