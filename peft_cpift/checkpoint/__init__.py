"""Reading and writing tensors on disk. Knows files and folders, and nothing of either method."""

from peft_cpift.checkpoint.reader import Checkpoint, Source, open_source
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.checkpoint.writer import complete_file, complete_folder, write_tensors

__all__ = ["Checkpoint", "Source", "Tensors", "complete_file", "complete_folder", "open_source", "write_tensors"]
