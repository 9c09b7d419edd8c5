"""Text in, token ids out, and back: tokenizers, chat templates, streaming detokenisation.

Imports nothing of ours but `errors`, and no torch.
"""

from .load import load_tokenizer
from .stream import StreamDecoder
from .tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]
