"""Whether a run is in W&B online, offline or not at all: found out before anything starts, without the network."""

import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit


def decide_mode(mode: str) -> tuple[str, str | None]:
    """The mode that a whole run uses, and a line for the user where that is not simply what was asked for.

    Called once, by the launcher, before anything starts: it looks for an API key but neither asks the network nor
    prompts, as wandb would do in the middle of a run. WANDB_MODE decides where the settings say `auto`.
    """
    saved = _saved_settings()
    asked = mode
    if mode == "auto":
        asked = os.environ.get("WANDB_MODE") or saved.get("mode") or "auto"
        asked = {"dryrun": "offline", "run": "online", "shared": "online"}.get(asked, asked)
    if asked in ("offline", "disabled"):
        return asked, None if asked == mode else f"tracking: W&B {asked}, as set by WANDB_MODE or `wandb {asked}`"
    place = _find_api_key(saved)
    if place is None:
        return "offline", (
            "tracking: W&B offline, no API key found (set one with `wandb login` or WANDB_API_KEY, upload later with "
            "`wandb sync`, or turn W&B off with tracking=none)"
        )
    return "online", None if mode == "online" else f"tracking: W&B online, API key found in {place}"


def server() -> str:
    """The address of the W&B server that runs are sent to."""
    return os.environ.get("WANDB_BASE_URL") or _saved_settings().get("base_url") or "https://api.wandb.ai"


def _saved_settings() -> dict[str, str]:
    """What `wandb login` and `wandb offline` have left: the user's settings file, then the working folder's."""
    config = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    saved = configparser.ConfigParser(interpolation=None)
    try:
        saved.read([config / "settings", here / "settings"])
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(saved["default"]) if saved.has_section("default") else {}


def _find_api_key(saved: Mapping[str, str]) -> str | None:
    """Where wandb would find a key, in its own order. The key itself is not read further."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    if saved.get("api_key") or saved.get("identity_token_file"):
        return "the W&B settings file"
    host = urlsplit(server()).netloc
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return str(path) if entry and entry[2] else None
