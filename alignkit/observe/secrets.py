"""Secrets stay where they are: what looks like one is refused in settings and hidden in what leaves this machine."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_NAMES = (
    r"(?:\w+[_-])?(?:api[_-]?key|secret(?:[_-]key)?|password|passwd|access[_-]key|"
    r"passphrase|credentials?|private[_-]key|"
    r"(?:access|auth|api|hub|bearer|hf|wandb|github|session)[_-]token)"
)
SECRET_KEY = re.compile(rf"{_NAMES}|token|authorization|x-api-key", re.IGNORECASE)
_SHAPES = (  # of well-known keys
    r"\b(?:hf_[A-Za-z0-9]{24,}|sk-(?:(?:proj|ant|or)-[\w-]{16,}|[A-Za-z0-9]{24,})|gh[pousr]_[A-Za-z0-9]{24,}|"
    r"github_pat_\w{20,}|wandb_v1_\w{16,}|AKIA[0-9A-Z]{16})"
)
SHAPE = re.compile(_SHAPES)
_VARIABLE = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")
_PASSED = re.compile(
    rf"://[^/\s@:]*:[^/\s@]+@|://\S*[?&](?:{_NAMES}|token|key|sig|x-amz-signature)=|{_SHAPES}", re.IGNORECASE
)
_IN_QUERY = re.compile(rf"([?&](?:{_NAMES}|token|key|sig)=)[^\s&'\"]+", re.IGNORECASE)
_IN_TEXT = re.compile(
    rf"\b({_NAMES}|token|authorization)(['\"]?\s*[=:]\s*['\"]?)(?:bearer\s+)?[^\s&,'\"}}\]]+", re.IGNORECASE
)


def redacted(value: Any, key: str = "") -> Any:
    """The value with *** for what is named like a secret and for user:password in addresses, at any depth."""
    if isinstance(value, Mapping):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_KEY.fullmatch(key):
        return HIDDEN
    return SHAPE.sub(HIDDEN, _IN_TEXT.sub(rf"\1\2{HIDDEN}", _IN_URL.sub(f"{HIDDEN}@", value)))


def without_secrets(text: str) -> str:
    """An error's words or traceback with *** for passwords in addresses, for what has the shape of a key, and for the
    values of environment variables that are named like one, which an endpoint or a library may have told back."""
    for name, value in os.environ.items():
        if len(value.strip()) >= 8 and _VARIABLE.search(name):
            text = text.replace(value.strip(), HIDDEN)
    return SHAPE.sub(HIDDEN, _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(f"{HIDDEN}@", text)))


def secrets_in(value: Any, name: str = "") -> Iterator[str]:
    """The dotted names of settings that hold a secret, which would be written into every run's files."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from secrets_in(item, name)
    elif isinstance(value, str) and value and (SECRET_KEY.fullmatch(name.rpartition(".")[2]) or _PASSED.search(value)):
        yield name
