"""Read a W&B offline run back from its transaction log, without network and without wandb's internals.

A `.wandb` file is a 7-byte header (":W&B", magic, version) followed by LevelDB log records: blocks of 32 KiB, and in
them chunks of (crc32, length, kind) and payload, where kind says whether the chunk is a whole record or its first, a
middle or its last piece. Each record is a protobuf `Record`. wandb's own reader has moved or gone with most versions;
this format has not changed.
"""

import fnmatch
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

HEADER_BYTES = 7
BLOCK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


class OfflineRun:
    """A finished run: `run` (project, run_group, job_type, ...), `config`, `history`, `summary`, `artifacts`, `alerts`,
    `exit_code`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        self.exit_code: int | None = None
        for record in _records(next(folder.glob("*.wandb"))):
            self._take(record)
        self.config.pop("_wandb", None)

    def _take(self, record) -> None:
        kind = record.WhichOneof("record_type")
        message = getattr(record, kind) if kind else None
        if kind == "run":
            self.run |= MessageToDict(message, preserving_proto_field_name=True)
            self.config |= _items(message.config.update)
        elif kind == "config":
            self.config |= _items(message.update)
        elif kind == "history":
            self.history.append(_items(message.item))
        elif kind == "summary":
            self.summary |= _items(message.update)
        elif kind == "metric":
            self.metrics.append(MessageToDict(message, preserving_proto_field_name=True))
        elif kind == "artifact":
            self.artifacts.append(MessageToDict(message, preserving_proto_field_name=True))
        elif kind == "alert":
            self.alerts.append(MessageToDict(message, preserving_proto_field_name=True))
        elif kind == "request" and message.WhichOneof("request_type") == "log_artifact":
            self.artifacts.append(MessageToDict(message.log_artifact.artifact, preserving_proto_field_name=True))
        elif kind == "exit":
            self.exit_code = message.exit_code

    def series(self, name: str, step: str) -> list[tuple[Any, Any]]:
        """(step, value) of every row that has the name."""
        return [(row.get(step), row[name]) for row in self.history if name in row]

    def step_metric(self, name: str) -> str | None:
        """The x-axis that was defined for a name, by itself or by a pattern."""
        for metric in self.metrics:
            matches = metric.get("name") == name or fnmatch.fnmatchcase(name, metric.get("glob_name", ""))
            if matches and "step_metric" in metric:
                return metric["step_metric"]
        return None

    def increments(self, name: str) -> list[tuple[list[str], list[list[Any]]]]:
        """(columns, rows) of each file that an incremental table was written to."""
        found = []
        for row in self.history:
            if row.get(f"{name}._type") == "incremental-table-file":
                table = json.loads((self.folder / "files" / row[f"{name}.path"]).read_text())
                found.append((table["columns"], table["data"]))
        return found


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    if content[:4] != b":W&B":
        raise ValueError(f"{path}: not a W&B transaction log")
    position, pieces = HEADER_BYTES, b""
    while position + CHUNK_HEADER.size <= len(content):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < CHUNK_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        position += CHUNK_HEADER.size
        chunk = content[position : position + length]
        position += length
        pieces = chunk if kind in (FULL, FIRST) else pieces + chunk
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(pieces)


def _items(items: Iterable[Any]) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
