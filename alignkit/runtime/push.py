"""A folder on its way to the Hugging Face Hub; the token is that of `hf auth login` or HF_TOKEN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STALE = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier model there, unless they are sent anew


def open_hub(name: str, public: bool, base: str) -> HfApi:
    """Find out, before any work, that there is a way to the repository `name`. base: of an adapter, else "". Raises
    UserError, ConnectionError."""
    from huggingface_hub import HfApi

    if base and "/" not in base:
        raise UserError(f"export: --push={name}: the adapter stands on '{base}', which is not of the Hub; push "
                        "--form=merged")  # fmt: skip
    hub = HfApi()
    with told(name):
        hub.whoami()
        private = hub.repo_info(name).private if hub.repo_exists(name) else not public
    if private is public:
        mend = "private: leave --public out" if public else "public: add --public"
        raise UserError(f"export: --push={name}: the repository is there and {mend}, or choose another name")
    return hub


def send(folder: Path, hub: HfApi, name: str, public: bool) -> str:
    """Send a folder and return where it is then. Raises UserError, ConnectionError."""
    with told(name):
        hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="alignkit export", delete_patterns=STALE)
    return f"pushed to {hub.endpoint}/{name} ({'public' if public else 'private'})"


@contextmanager
def told(name: str) -> Iterator[None]:
    """What the Hub, or the way there, says in a line: a person's mistake as UserError, the rest as ConnectionError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and not in __all__

    try:
        if name.count("/") != 1:
            raise HFValidationError("one of each, with / between")
        validate_repo_id(name)
        yield
    except LocalTokenNotFoundError:
        raise UserError(f"export: --push={name}: no token of the Hub here: `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise UserError(f"export: --push={name}: expected OWNER/NAME: {' '.join(str(error).split())}") from None
    except Exception as error:  # of whichever library huggingface_hub sends with
        words = " ".join(str(error).split())[:300]
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise UserError(f"export: --push={name}: may this token write there? the Hub says: {words}") from None
        raise ConnectionError(f"--push={name}: {type(error).__name__}: {words}") from None
