"""The Hugging Face hub, asked only when a recipe names it, and never waited for when it cannot answer."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlparse

PROBE_SECONDS = 3.0


def answers() -> bool:
    """Whether the hub (HF_ENDPOINT) can be reached; False at once with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # a proxy resolves names for us
    url = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def fetch(repo: str, file: str) -> Path | None:
    """A file of a hub repository, from the local cache or the network; None where neither has it."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    if not answers():
        return None
    try:
        return Path(hf_hub_download(repo, file))
    except Exception:  # every failure of the hub means the same here: not to be had
        return None
