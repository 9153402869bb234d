"""Rows from data sets on the Hugging Face Hub, or from local folders that `datasets.load_dataset` can take."""

import hashlib
import json
from typing import Any

from alignkit.data.assemble import RawRow, RowOptions, corpus_from_rows
from alignkit.data.corpus import Corpus
from alignkit.errors import UserError
from alignkit.schema import settings


@settings
class Hub(RowOptions):
    """`data=hub`: `path`, `name`, `split` and `revision` mean what they mean to `datasets.load_dataset`. Several data
    sets, such as one of demonstrations and one of preferences, are a list of paths; each of the other three then holds
    for all of them, or is a list too."""

    path: str | list[str] | None
    name: str | list[str | None] | None
    split: str | list[str]
    revision: str | list[str | None] | None

    def __post_init__(self) -> None:
        RowOptions.__post_init__(self)
        count = len(self.path) if isinstance(self.path, list) else 1
        for key in ("name", "split", "revision"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(f"{key} must be one value for all data sets or a list of {count}, got {len(value)}")

    def load(self, seed: int) -> Corpus:
        rows = (
            RawRow(f"{path}[{split}]", number, row)
            for path, name, split, revision in self._sources()
            for number, row in enumerate(read(path, name, split, revision), start=1)
        )
        return corpus_from_rows(rows, self, seed)

    def fingerprint(self) -> str:
        """`datasets` derives its own from the builder, the split and the commit (Hub) or path and date (local files)
        of every data file; the settings are added because a newer `datasets` may derive it otherwise."""
        parts = [part for source in self._sources() for part in (*source, read(*source)._fingerprint)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _sources(self) -> list[tuple[str, str | None, str, str | None]]:
        """(path, name, split, revision) of each data set, in the order given."""
        if not self.path:
            raise UserError(
                "data.path=ID is required: a data set's id on the Hub, such as Anthropic/hh-rlhf, or a folder"
            )
        paths = [self.path] if isinstance(self.path, str) else self.path

        def each(value: Any) -> list[Any]:
            return value if isinstance(value, list) else [value] * len(paths)

        return list(zip(paths, each(self.name), each(self.split), each(self.revision)))


def read(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """One data set. Raises UserError with the reason why it cannot be had."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, revision=revision)
    except Exception as error:  # whatever it is, it concerns the data set that these four settings name
        root: BaseException = error
        while root.__cause__:  # "An error occurred while generating the dataset" has the reason underneath
            root = root.__cause__
        reason = " ".join((str(root) or type(root).__name__).split())[:300]
        named = f"data.path={path} data.name={name} data.split={split} data.revision={revision}"
        raise UserError(f"{named}: expected a data set that can be loaded, got {reason}") from error
