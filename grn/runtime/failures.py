"""One line for an error that a user can mend: mistakes of usage, and what went wrong outside of the command."""

import re

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from grn.runtime.errors import UserError
from grn.runtime.near_misses import near_misses, near_names
from grn.runtime.secrets import cut_line

# What a user can mend; anything else is a bug and keeps its traceback.
MISTAKES = (UserError, HydraException, OmegaConfBaseException)

# Part of torch's message -> what to say.
LOST = (
    (
        r"DataLoader worker .*(exited unexpectedly|is killed by signal)",
        "a worker process of the data was killed (out of memory?): lower data.num_workers or data.batch_size; "
        "a run resumes with ckpt_path=last",
    ),
    (
        r"(?s)(gloo|Gloo|NCCL|ProcessGroup|c10d|TCPStore).*"
        r"(closed by peer|reset by peer|[Bb]roken pipe|Socket closed|remote process exited|Connection refused)",
        "another process of this command ended (killed, out of memory?), its own output says more; "
        "a run resumes with ckpt_path=last",
    ),
    (
        r"DefaultCPUAllocator: (can't|not enough)|^MemoryError",
        "the memory is full: lower the batch size (data.batch_size, batch_size) or data.num_workers",
    ),
    (
        r"(CUDA|HIP|MPS|XPU).*out of memory",
        "the accelerator's memory is full: lower the batch size (data.batch_size, batch_size), or, in training, choose "
        "cluster.activation_checkpointing=full",
    ),
)


def named(error: RuntimeError | MemoryError) -> str | None:
    """One line for what a user can mend; None for anything else, which is a bug and keeps its traceback."""
    said = f"MemoryError: {error}" if isinstance(error, MemoryError) else str(error)
    return next((told for pattern, told in LOST if re.search(pattern, said)), None)


def explain(error: BaseException) -> str:
    """One line for an error of usage: the innermost cause that speaks to the user, and near misses of a wrong key."""
    return _one_line(_explanation(error))


def _explanation(error: BaseException) -> str:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if told := re.search(r"UserError raised while resolving interpolation: (.*)", str(cause)):
            return told.group(1)
        if missing := re.search(r"[Mm]issing mandatory value: (\S+)", str(cause)):
            return f"{missing.group(1)} must be given: add {missing.group(1)}=... to the command"
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.key is not None:
            return _unknown_key(cause)
        if isinstance(cause, OverrideParseException):
            key = cause.override.partition("=")[0]
            return f"{cause.override} cannot be read: quote what is a text, in the shell, too: '{key}=\"...\"'"
        if ambiguous := re.search(r"Ambiguous value for argument '(([^=]*)=.*)'", str(cause)):
            what, key = ambiguous.groups()
            return f"{what} may be a list ({key}=[...]), a sweep (add -m) or a text ('{key}=\"...\"'): say which"
    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    if isinstance(error, InstantiationException) and len(chain) > 1:
        where = re.search(r"full_key: (\S+)", str(error))
        return f"{where.group(1) if where else 'config'}: {_one_line(str(chain[-1]))}"
    return str(error)


def _unknown_option(error: MissingConfigException) -> str:
    said, missing = str(error).partition("Config search path")[0], error.missing_cfg_file or ""
    group = re.search(r"options in '([^']*)'", said)
    if not error.options or group is None:
        return said
    name = missing.removeprefix(f"{group[1]}/")
    near = near_names(name, error.options)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"there is no {group[1]}={name}; {hint}there are {', '.join(error.options)}"


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    siblings = [str(key) for key in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    siblings = [key for key in siblings if key != "hydra"]
    parent, key = error.parent_node._get_full_key(None) if siblings else "", str(error.key)
    root = error.parent_node._get_root() if siblings else None
    near = near_misses(f"{parent}.{key}" if parent else key, root) if isinstance(root, DictConfig) else []
    near = [name.removeprefix(f"{parent}.") if parent else name for name in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(siblings)}"
    if not siblings:
        above = (error.full_key or "").rpartition(".")[0]
        hint = f"{above or 'it'} is null here; choose an option of its group first, e.g. scores=digits"
        if above == "sampler.schedule":
            hint = f"{above} comes from the checkpoint; add sampler=linear, or another option, to set its keys"
    return f"no config key {error.full_key or error.key!r}; {hint}"


def _one_line(text: str) -> str:
    return cut_line("; ".join(line.strip() for line in text.splitlines() if line.strip()))
