"""Networks as folders, in the habits of Hugging Face: `config.json` beside `model.safetensors`, on disk or on the Hub.

`config.json` holds the constructor's arguments and, under names that start with an underscore, what they belong to: the
class, the version of this layout, the version of GRN, and where the weights came from.
"""

import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import Self

import grn
from grn.runtime.errors import UserError
from grn.runtime.files import write_folder, write_json
from grn.weights.building import build_with_weights
from grn.weights.kinds import CARD, CONFIG, HUB, PICTURE, WEIGHTS
from grn.weights.mapping import check_finite

FORMAT = 1  # of config.json; a later one may mean another thing by the same names
MAX_CONFIG_BYTES = 1 << 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Pretrained(nn.Module):
    """What makes an `nn.Module` loadable in one call: `class Network(Pretrained, nn.Module)`.

    Its constructor's arguments must be numbers, strings, booleans, None, or sequences and mappings of them.
    """

    _arguments: dict[str, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        network = super().__new__(cls)
        # Partial: copying and unpickling make the object without arguments, and fill in its attributes afterwards.
        bound = inspect.signature(cls.__init__).bind_partial(network, *arguments, **named)
        bound.apply_defaults()
        given = dict([*bound.arguments.items()][1:])
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:  # **sizes, which a class derived from ours passes on
                given |= given.pop(name, {})
        network.__dict__["_arguments"] = {name: _plain(value) for name, value in given.items()}
        return network

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that the network was made with, defaults included, as plain containers."""
        return dict(self._arguments)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        subfolder: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The network of a folder that `save_pretrained` wrote, in evaluation mode; nothing in it is executed.

        Args:
            path_or_hub_id: the folder, or the id of a repository on the Hugging Face Hub: `owner/name`, or
                `hf://owner/name` as config keys want it.
            subfolder: where in it, e.g. `refiner` of an exported refiner (grn.checkpoints.exported).
            device: where the weights go.
            dtype: of the weights, whatever the file has.
            revision, cache_dir, token, local_files_only: of the Hub, as in `huggingface_hub.snapshot_download`.

        Raises:
            UserError: neither there nor to be had from the Hub; not whole, not of this class, or not fitting together.
        """
        folder = fetch(
            path_or_hub_id,
            files=[f"{subfolder}/{name}" if subfolder else name for name in (CONFIG, WEIGHTS)],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        folder = folder / (subfolder or "")
        config, source = read_config(folder), folder / CONFIG
        if config["_class_name"] != cls.__name__:
            raise UserError(f"{source} is of a {brief(config['_class_name'])}, not of a {cls.__name__}")
        state = _read_weights(folder / WEIGHTS)
        arguments = {name: value for name, value in config.items() if not name.startswith("_")}
        known = dict([*inspect.signature(cls.__init__).parameters.items()][1:])
        more = {name for name, parameter in known.items() if parameter.kind is parameter.VAR_KEYWORD}
        needed = {name for name, parameter in known.items() if parameter.default is parameter.empty} - more
        unknown = set() if more else arguments.keys() - known.keys()
        if odd := sorted(unknown | (needed - arguments.keys())):
            what = "lacks" if odd[0] in known else "has an unknown"
            raise UserError(f"{source} {what} argument {brief(odd[0])} of {cls.__name__}; export the network again")
        network = build_with_weights(
            lambda: cls(**arguments),
            state,
            source=str(folder / WEIGHTS),
            described=f"{source} describes no {cls.__name__}",
            remedy=f"put back the {CONFIG} it was saved with",
        )
        return network.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, folder: str | Path, *, provenance: Mapping[str, Any] | None = None) -> Path:
        """Writes `config.json` and `model.safetensors`: the whole folder or nothing, and always to the same bytes.

        Args:
            folder: a new or an empty one, or an earlier one of this kind, which is replaced.
            provenance: where the weights came from, for `config.json`: plain values.

        Returns:
            `folder`.

        Raises:
            UserError: `folder` holds something else, or weights are NaN or infinite.
        """
        folder = Path(folder).expanduser()
        check_replaceable(folder)
        check_finite(self.state_dict(), source=type(self).__name__)
        config = marks(type(self).__name__) | {"_provenance": dict(provenance or {})} | self.config

        def write(temporary: Path) -> None:
            write_json(temporary / CONFIG, config)
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode)  # it is made private to its owner

        return write_folder(folder, write)

    def push_to_hub(
        self,
        hub_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to the repository `owner/name` on the Hub, which is made where missing.

        Returns:
            the URL of the commit.

        Raises:
            UserError: the Hub refuses, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save_pretrained(Path(scratch) / "export", provenance=provenance)
            return upload(folder, hub_id, private=private, revision=revision, token=token)


def upload(folder: Path, hub_id: str, *, private: bool, revision: str | None, token: str | bool | None) -> str:
    """Puts a folder's files into the repository `owner/name` on the Hub, which is made where missing.

    Returns:
        the URL of the commit.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    with _hub_errors(hub_id, "log in by `hf auth login`, or save_pretrained a folder"):
        hub = HfApi(token=token)
        hub.create_repo(hub_id, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=hub_id, folder_path=folder, revision=revision).commit_url)


def fetch(
    path_or_hub_id: str | Path,
    *,
    files: Sequence[str] = (CONFIG, WEIGHTS),
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of `path_or_hub_id`; where it is none here, downloaded from the Hub (see `from_pretrained`), of
    which `files` are wanted."""
    hub_id = str(path_or_hub_id).removeprefix(HUB)
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is not a folder of {CONFIG} and {WEIGHTS}; python -m grn.export ckpt={path} makes one")
    if not is_hub_id(hub_id):
        raise UserError(
            f"no such folder: {path}; python -m grn.export writes one from a checkpoint (from the Hub: owner/name)"
        )
    with _hub_errors(hub_id, "give a local folder"):
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )


def local_file(path: str | Path) -> str | Path:
    """`path`, or of a file in a repository on the Hub, `hf://owner/name/path/of/file.pth`, where it is downloaded to.

    Raises:
        UserError: no such file there, or the Hub cannot be reached.
    """
    owner, _, rest = str(path).removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    if not str(path).startswith(HUB) or not file:
        return path
    found = fetch(f"{HUB}{owner}/{name}", files=[file]) / file
    if not found.is_file():
        raise UserError(f"{path}: the repository {owner}/{name} has no such file")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of such a folder; of its values only `_class_name`, `_format` and `_provenance` are checked.

    Raises:
        UserError: missing, damaged, hostile, or of somebody else's network.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}: it is not an exported network; python -m grn.export writes one")
    config = read_marked_json(path)
    if not isinstance(config.setdefault("_provenance", {}), dict):
        raise UserError(f"{path}: _provenance must be an object")
    return config


def read_marked_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file of ours, whose `_class_name`, `_format` and `_grn_version` say what it is.

    Raises:
        UserError: damaged, hostile, of somebody else's network, or of a later format.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        config = json.loads(text) if len(text) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({brief(error)})") from None
    if not isinstance(config, dict) or not {"_class_name", "_format", "_grn_version"} <= config.keys():
        raise UserError(f"{path} is not the config of a GRN network; python -m grn.export writes one")
    if config["_format"] != FORMAT:
        raise UserError(f"{path} is of format {brief(config['_format'])}, this GRN reads {FORMAT}: use a later GRN")
    return config


def marks(class_name: str) -> dict[str, Any]:
    """What `read_marked_json` looks for."""
    return {"_class_name": class_name, "_format": FORMAT, "_grn_version": grn.__version__}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of `path`, mapped into memory; the file's own header is checked against its size by safetensors."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {WEIGHTS} (pickled weights are not read); export the network again")
    try:
        state = load_file(path)
    except Exception as error:  # a SafetensorError, mostly; other kinds for what it lets through
        raise UserError(f"{path} cannot be read as safetensors ({brief(error)})") from None
    for name, tensor in state.items():
        if not name.isprintable() or len(name) > 200:
            raise UserError(f"{path} holds a tensor with an impossible name; export the network again")
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {brief(name)} is {tensor.dtype}, where weights are floats of 16 bits or more")
    return state


def check_replaceable(folder: Path) -> None:
    """Raises:
    UserError: a file, or a folder that holds anything but an export of a network.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another place")
    foreign = sorted({entry.name for entry in folder.iterdir()} - {CONFIG, WEIGHTS, CARD, PICTURE})
    if foreign:
        raise UserError(f"{folder} holds other files ({foreign[0]}): choose a new folder")
    if (folder / CONFIG).exists():
        read_config(folder)  # somebody else's network has files of the same names


def is_hub_id(name: str) -> bool:
    """Whether `name` is like `owner/name`, and is not plainly meant as a path: one into a folder that is here."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) or Path(name).parent.is_dir():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@contextmanager
def _hub_errors(hub_id: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise UserError(f"{hub_id}: not here, and no such repository, or not for you, on the Hub; {remedy}") from None
    except Exception as error:  # its HTTP library's errors have no base class in common over its versions
        raise UserError(f"{hub_id}: not here, and the Hub cannot be reached ({brief(error)}); {remedy}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def brief(reason: object) -> str:
    """What a file or a library says, as part of one line."""
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."
