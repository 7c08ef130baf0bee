"""Text to token ids and back, and conversations to text, as the checkpoint's own files say."""

from tinychat.tokenizer.chat_template import ChatTemplate
from tinychat.tokenizer.detokenizer import IncrementalDecoder
from tinychat.tokenizer.tokenizer import Tokenizer, load

__all__ = ["ChatTemplate", "IncrementalDecoder", "Tokenizer", "load"]
