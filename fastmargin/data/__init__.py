"""Face data sets in their usual formats: RecordIO files, without mxnet, and image folders.

Independent of the heads, which import nothing from here. Decoding images needs Pillow.
"""

from fastmargin.data.block_shuffle import BlockShuffleSampler
from fastmargin.data.folder_faces import FolderFaces
from fastmargin.data.images import to_tensor
from fastmargin.data.record_faces import RecordFaces
from fastmargin.data.record_file import RecordError, RecordFile, write_index
from fastmargin.data.record_format import ImageRecord, pack, unpack
from fastmargin.data.record_writer import RecordWriter
from fastmargin.data.verification_pairs import VerificationPairs

__all__ = [
    "BlockShuffleSampler",
    "FolderFaces",
    "ImageRecord",
    "RecordError",
    "RecordFaces",
    "RecordFile",
    "RecordWriter",
    "VerificationPairs",
    "pack",
    "to_tensor",
    "unpack",
    "write_index",
]
