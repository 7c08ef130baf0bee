"""Reading and writing model directories: Hugging Face's layout, safetensors, AWQ. Strict, streamed, never a pickle."""

from tinychat.checkpoint.awq import AwqFormat
from tinychat.checkpoint.locate import locate
from tinychat.checkpoint.reader import Checkpoint, open
from tinychat.checkpoint.writer import CheckpointWriter

__all__ = ["AwqFormat", "Checkpoint", "CheckpointWriter", "locate", "open"]
