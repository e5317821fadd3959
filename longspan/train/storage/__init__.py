"""Tensors of a checkpoint as files, for torch's distributed checkpoint (DCP): safetensors and JSON, nothing pickled.

DCP's planners say which chunk of which tensor a rank writes, and which chunks make up what a rank reads, whatever the ranks were
that wrote them. DCP's own storage pickles its metadata, and its `save` and `load` pickle plans between ranks: here the writer and
the reader are ours, and planners are asked without them. A file also holds what torch's `HuggingFaceStorageReader` looks for.

    model-00003.safetensors     of rank 3: the tensors whose names begin with "model/"
    index-00003.json            of rank 3: {"model/norm.weight": {"dtype", "shape", "file", "offsets", "sizes"}, ...}
"""

from longspan.train.storage.index import SavedTensor, read_index
from longspan.train.storage.reading import read_tensors
from longspan.train.storage.share import own_share, staged
from longspan.train.storage.writing import write_tensors

__all__ = ["SavedTensor", "own_share", "read_index", "read_tensors", "staged", "write_tensors"]
