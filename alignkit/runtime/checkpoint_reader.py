"""Reads what torch.distributed.checkpoint has written as plain data: nothing in a checkpoint is run, whoever made it.

That library unpickles `.metadata`, and every entry that is no tensor. Here the first may name the classes that the
library itself writes there and no others, all entries are tensors, and their files lie in the checkpoint's folder.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from alignkit.errors import UserError

KNOWN = {
    **{("torch.distributed.checkpoint.metadata", each): getattr(metadata, each) for each in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},  # by version of Python
}  # fmt: skip


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return KNOWN[module, name]


class Reader(dcp.FileSystemReader):
    """For `dcp.load`. Raises UserError if the metadata is not of tensors alone in files of this folder."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        try:
            with (place / ".metadata").open("rb") as file:
                self.known = _Plain(file).load()
            kinds = {type(each) for each in self.known.state_dict_metadata.values()}
            files = {each.relative_path for each in self.known.storage_data.values()}
        except Exception as error:  # bytes that are no pickle raise anything
            raise UserError(f"{place} is no checkpoint of alignkit and is not read: {error}") from None
        if kinds - {metadata.TensorStorageMetadata} or any(Path(name).name != name for name in files):
            raise UserError(
                f"{place} is no checkpoint of alignkit and is not read: not all of it is tensors in its files"
            )
        self.known.storage_meta = metadata.StorageMeta(load_id=self.load_id)

    def read_metadata(self) -> metadata.Metadata:
        """What was read when this was made."""
        return self.known
