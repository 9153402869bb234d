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
    (each.__module__, each.__name__): each
    for each in (
        *(metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata, metadata.Metadata, metadata.MetadataIndex),
        *(metadata.StorageMeta, metadata.TensorProperties, metadata.TensorStorageMetadata, torch.Size),
        *(metadata._MEM_FORMAT_ENCODING, filesystem._StorageInfo, torch.serialization._get_layout),
    )
} | {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}  # by version of Python


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
            for index, each in self.known.storage_data.items():
                if not isinstance(self.known.state_dict_metadata[index.fqn], metadata.TensorStorageMetadata):
                    raise ValueError(f"{index.fqn} is no tensor")
                if Path(each.relative_path).name != each.relative_path:
                    raise ValueError(f"{index.fqn} is not in a file of it")
        except Exception as error:  # bytes that are no pickle raise anything
            raise UserError(f"{place} is no checkpoint of alignkit and is not read: {error}") from None
        self.known.storage_meta = metadata.StorageMeta(load_id=self.load_id)

    def read_metadata(self) -> metadata.Metadata:
        """What was read when this was made."""
        return self.known
