"""Removes secrets from what is recorded and logged: URL queries and credentials, arguments of commands.

A presigned URL is a key to the data; so is a token in a `pipe:` command.
"""

import re
import shlex
from typing import Any

CUT = "***"  # stands for what was there
PROMPTS = ("prompts", "negative_prompt", "prompt_prefix", "prompt_suffix", "context_prefix")

_URL = re.compile(r"([A-Za-z][\w+.-]*://)([^\s/?#@'\"]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?")
_TOKEN = re.compile(
    r"(?i)\b(bearer\s+|(?:[\w-]*(?:token|secret|password|passwd|api[_-]?key|signature))[=:]\s*)[^\s'\",)]+"
)
_PIPE = re.compile(r"""(?<=')pipe:[^']*(?=')|(?<=")pipe:[^"]*(?=")|pipe:.*""", re.DOTALL)
_SHARD = re.compile(r"\.(tar|tgz)(\.\w+)?$")


def cut_line(text: str) -> str:
    """Prose without the queries and credentials of its URLs, the arguments of `pipe:` commands, which end with their
    quotes or with the text, and without what looks like a token."""
    text = _PIPE.sub(lambda found: _cut_command(found[0]), text)
    return _TOKEN.sub(lambda found: found[1] + CUT, _URL.sub(_cut_url, text))


def cut(value: str) -> str:
    """One value, or key=value: URLs without queries and credentials, a `pipe:` command without its arguments, but for
    URLs and names of shards."""
    if (start := value.find("pipe:")) >= 0:
        return cut(value[:start]) + _cut_command(value[start:])
    return _URL.sub(_cut_url, value)


def without_secrets(node: Any) -> Any:
    """Plain containers with `cut` applied to every text but prompts, which samples depend on."""
    if isinstance(node, dict):
        return {key: value if key in PROMPTS else without_secrets(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [without_secrets(value) for value in node]
    return cut(node) if isinstance(node, str) else node


def _cut_url(found: re.Match) -> str:
    scheme, credentials, place, query = found.groups()
    return scheme + (f"{CUT}@" if credentials else "") + place + (f"?{CUT}" if query else "")


def _cut_command(text: str) -> str:
    try:
        program, *words = shlex.split(text)
    except ValueError:
        return f"pipe:{CUT}"
    kept = [program if "=" not in program else f"pipe:{CUT}"]
    for word in words:
        if _URL.match(word) or _SHARD.search(word):
            kept.append(_URL.sub(_cut_url, word))
        elif kept[-1] not in (CUT, f"pipe:{CUT}"):
            kept.append(CUT)
    return " ".join(kept)
