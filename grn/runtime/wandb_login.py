"""Whether somebody is logged in to W&B on this machine."""

import os
from netrc import NetrcParseError, netrc
from urllib.parse import urlparse

WANDB_URL = "WANDB_BASE_URL"
WANDB_SERVERS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")  # wandb's own, by its versions


def wandb_offline() -> bool:
    """True unless somebody is logged in (an API key in the environment or in netrc) or WANDB_MODE says otherwise."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    servers = [os.environ[WANDB_URL]] if os.environ.get(WANDB_URL) else WANDB_SERVERS
    try:
        known = netrc(os.environ.get("NETRC"))
        return all(known.authenticators(urlparse(url).hostname or "") is None for url in servers)
    except (OSError, NetrcParseError):
        return True
