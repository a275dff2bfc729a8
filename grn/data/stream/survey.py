"""Describes what a shard holds, for errors about shards without usable samples."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import islice

from grn.data.samples import LABEL_SUFFIXES, METADATA_SUFFIXES, TOKEN_SUFFIXES
from grn.data.stream.streaming import FEW, LONGEST, MAX_ENTRY_BYTES, ShardDataset, printable, read_shard, suffixes
from grn.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from grn.media.skips import Reason

SAMPLES = 200  # of a shard that are looked at
TEXTS = ("caption", "text", "txt", "prompt", "description", "title", "alt", "long_caption", "short_caption")


def survey(url: str, reasons: Sequence[str], *, key: str) -> str:
    """What is found in a shard of which no sample could be used, and which key would have it used; one line, or "".

    Args:
        reasons: of `Reason`, by their values: why samples were skipped.
        key: where the config has the data, for messages.
    """
    raws: list[dict] = []
    try:
        with closing(read_shard(url, dict.fromkeys(METADATA_SUFFIXES, 2**16))) as samples:
            raws.extend(islice(samples, SAMPLES))
    except Exception:  # what broken shards raise has no end; they are counted already
        pass
    if not raws:
        return ""
    return "; ".join(filter(None, (_names(raws), *_remedies(raws, set(reasons), key))))


def why_none(data: ShardDataset, key: str) -> str:
    """What to say of data without a usable sample, after "no usable sample": why, what there is, what to look at."""
    skipped = data.skipped()
    counts = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    found = survey(data.urls[0], list(skipped), key=key)
    said = f"; {found}" if found else f"; check the {key}.* keys and the shards"
    return f"({counts or 'they are empty'}){said}; the first shard is {data.urls[0]}"


def _names(raws: Sequence[dict]) -> str:
    """How the files are named and where they stand, which is all that makes samples of them."""
    first = raws[0]
    dotted = [raw for raw in raws if not _known(raw) and any(s.rpartition(".")[2] in MAX_ENTRY_BYTES for s in raw)]
    if 2 * len(dotted) > len(raws):
        name = dotted[0]["__key__"][:LONGEST]
        return (
            f"keys end at the first dot of a name, so that {name!r} has {suffixes(dotted[0])}: name files with one dot"
        )
    keys = Counter(raw["__key__"] for raw in raws)
    apart = [key for key, count in keys.items() if count > 1]
    if apart:
        parts = [suffixes(raw) for raw in raws if raw["__key__"] == apart[0]]
        name = apart[0][:LONGEST]
        return (
            f"the parts of a sample do not stand together: {name!r} has {parts[0]} in one place and {parts[1]} in "
            "another: write the shards anew, sorted by name (tar --sort=name)"
        )
    kinds = Counter(suffix for raw in raws for suffix in raw if not suffix.startswith("__")).most_common()
    lone = len(raws) > 1 and all(len(raw) == 3 for raw in raws) and len(kinds) > 1
    told = ", ".join(f"{printable(suffix)} ({count})" for suffix, count in kinds[:FEW])
    told += f" and {len(kinds) - FEW} other suffixes" if len(kinds) > FEW else ""
    alone = (
        f", each alone, the first is {first['__key__'][:LONGEST]!r}: parts of a sample need one name" if lone else ""
    )
    return f"its samples have {told}{alone}"


def _known(raw: dict) -> bool:
    return any(suffix in MAX_ENTRY_BYTES for suffix in raw)


def _remedies(raws: Sequence[dict], reasons: set[str], key: str) -> list[str]:
    """Which keys of the config would have such samples used."""
    found = {suffix for raw in raws for suffix in raw}
    told = []
    if Reason.NO_CAPTION.value in reasons and (texts := _texts(raws)):
        names = ", ".join(texts[:FEW]) + (" ..." if len(texts) > FEW else "")
        told.append(f"key.json has the texts {names}: choose by ++{key}.captions={{txt:0,{texts[0]}:1}}")
    if reasons & {Reason.NO_IMAGE.value, Reason.NO_VIDEO.value, Reason.NO_TOKENS.value}:
        if Reason.NO_IMAGE.value in reasons and found & {*VIDEO_SUFFIXES}:
            told.append("videos are read by data=video or data=captioned_video")
        if Reason.NO_IMAGE.value not in reasons and found & {*IMAGE_SUFFIXES}:
            told.append("images are read by data=imagenet or data=captioned_image")
        if Reason.NO_TOKENS.value not in reasons and found & {*TOKEN_SUFFIXES}:
            told.append("tokens are read by data=tokens or data=captioned_tokens")
    if Reason.NO_LABEL.value in reasons and not found & {*LABEL_SUFFIXES}:
        told.append(f'labels are key.cls, or "label" of key.json; without labels, {key}.num_labels=null')
    if Reason.IMAGE_SIZE.value in reasons:
        told.append(f"images of other sizes than {key}.image_size are cropped by {key}.center_crop=true")
    return told


def _texts(raws: Sequence[dict]) -> list[str]:
    """Names of the texts in `key.json`, those that sound like captions first."""
    names = Counter()
    for raw in raws:
        try:
            metadata = json.loads(raw.get(METADATA_SUFFIXES[0], b""))
            names.update(
                name
                for name, value in metadata.items()
                if isinstance(value, str) and value.strip() and name.isidentifier()
            )
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    return sorted(names, key=lambda name: (TEXTS.index(name) if name in TEXTS else len(TEXTS), -names[name]))
