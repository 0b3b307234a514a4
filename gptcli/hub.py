"""The Hugging Face hub, asked only when a recipe names it, and never waited for when it cannot answer."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlparse

from gptcli.errors import UserError

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


def fetch_model(name: str) -> Path:
    """The folder of a hub model, ORGANISATION/NAME[@REVISION] or hf:NAME: from the local cache, or the network.
    Pickled weights are fetched only where there are no safetensors. Raises UserError where it cannot be had."""
    repo, _, revision = name.removeprefix("hf:").partition("@")
    if not name.startswith("hf:") and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(
            f"{name}: no such file or directory (a model of the hub is written ORGANISATION/NAME or hf:NAME)"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors", "tokenizer.model", "vocab.bpe"]
    online = answers()
    try:
        for more in ([], ["pytorch_model*.bin"]):
            folder = Path(
                snapshot_download(
                    repo, revision=revision or None, allow_patterns=patterns + more, local_files_only=not online
                )
            )
            if any(folder.glob("*.safetensors")):
                break
    except Exception as error:  # not there, private, gone, interrupted: one class each
        reason = str(error).strip().splitlines()[0]
        asked = "the hub" if online else "the local cache (the hub does not answer, or HF_HUB_OFFLINE is set)"
        raise UserError(f"{name}: no such file or directory, and {asked} does not have it: {reason}") from error
    return folder
