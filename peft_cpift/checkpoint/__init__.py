"""Reading and writing tensors on disk. Knows files and folders, and nothing of either method."""

from peft_cpift.checkpoint.reader import Checkpoint, Source, open_source
from peft_cpift.checkpoint.writer import ShardWriter, complete_file, complete_folder

__all__ = ["Checkpoint", "ShardWriter", "Source", "complete_file", "complete_folder", "open_source"]
