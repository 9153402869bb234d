"""Rows from a data set on the Hugging Face Hub, or from a local folder that `datasets.load_dataset` can take."""

import hashlib
import json
from typing import Any

from alignkit.data.assemble import RawRow, RowOptions, corpus_from_rows
from alignkit.data.corpus import Corpus
from alignkit.errors import UserError
from alignkit.schema import settings


@settings
class Hub(RowOptions):
    """`data=hub`: `path`, `name`, `split` and `revision` mean what they mean to `datasets.load_dataset`."""

    path: str | None
    name: str | None
    split: str
    revision: str | None

    def load(self, seed: int) -> Corpus:
        source = f"{self.path}[{self.split}]"
        rows = (RawRow(source, number, row) for number, row in enumerate(self._dataset(), start=1))
        return corpus_from_rows(rows, self, seed)

    def fingerprint(self) -> str:
        """`datasets` derives its own from the builder, the split and the commit (Hub) or path and date (local files)
        of every data file; the settings are added because a newer `datasets` may derive it otherwise."""
        parts = [self.path, self.name, self.split, self.revision, self._dataset()._fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _dataset(self) -> Any:
        if not self.path:
            raise UserError(
                "data.path=ID is required: a data set's id on the Hub, such as Anthropic/hh-rlhf, or a folder"
            )
        import datasets

        try:
            return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except Exception as error:  # whatever it is, it concerns the data set that these four settings name
            root: BaseException = error
            while root.__cause__:  # "An error occurred while generating the dataset" has the reason underneath
                root = root.__cause__
            reason = " ".join((str(root) or type(root).__name__).split())[:300]
            named = f"data.path={self.path} data.name={self.name} data.split={self.split} data.revision={self.revision}"
            raise UserError(f"{named}: expected a data set that can be loaded, got {reason}") from error
