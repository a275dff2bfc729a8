"""W&B runs: one for each run folder, continued on resuming and scoring; offline without a network.

`wandb.json` in the run folder knows the run's id. wandb takes a second to import and is imported when a run is opened.
"""

import json
import logging
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn.runtime.errors import UserError
from grn.runtime.files import read_bounded, write_json
from grn.runtime.secrets import cut

log = logging.getLogger(__name__)

RECORD = "wandb.json"
STEP = "trainer/global_step"  # the x axis of every curve, as Lightning names it
REACH = 8  # seconds for W&B's server to answer at all
START = 30  # seconds for it to open a run
MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The W&B run of a run folder: its `id`, `project`, `entity`, and the last `step` that was logged; None: none.

    Raises:
        UserError: `wandb.json` is something else.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(read_bounded(path, 2**16))
        names = [record["id"], record["project"], record["entity"] or "none"]
        if not all(isinstance(name, str) and re.fullmatch(r"[^\s/\\#?%:]{1,128}", name) for name in names):
            raise ValueError(names)
        if type(record["step"]) is not int or record["step"] < -1:
            raise ValueError("step")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} does not name a W&B run: remove it for a new one") from None
    return record


def log_results(ckpt: str | Path, results: Mapping[str, Any], *, step: int | None, offline: bool) -> None:
    """Adds what was made of a checkpoint to the W&B run that trained it; does nothing where its folder knows none.

    Args:
        ckpt: the checkpoint's file or folder, in a run folder.
        results: name -> a number, the path of a picture or film, or the rows of a table.
        step: the checkpoint's.
        offline: as of `open_run`.
    """
    folder = Path(ckpt).parent.parent
    if (record := read_record(folder)) is None:
        return
    import wandb

    about = {"id": record["id"], "project": record["project"], "entity": record["entity"]}
    run = open_run(folder, offline=offline, resume="allow", **about)
    try:
        kinds = {".png": wandb.Image, ".gif": wandb.Video, ".mp4": wandb.Video}
        row = max(record["step"] + 1, run.step)

        def shown_as(value: Any) -> Any:
            if isinstance(value, Path):
                return kinds[value.suffix](str(value))
            if isinstance(value, list):
                columns = list(dict.fromkeys(name for found in value for name in found))
                rows: list[Any] = [[found.get(name) for name in columns] for found in value]
                return wandb.Table(columns, rows, allow_mixed_types=True)
            return value

        shown = {name: shown_as(value) for name, value in results.items()}
        run.log(shown | ({} if step is None else {STEP: step}), step=row)
        write_json(folder / RECORD, record | {"step": row})
    finally:
        finish()


def _started(wandb: Any, **arguments: Any) -> Any:
    """`wandb.init`, which records the command: it sees one without what gives access to data."""
    given = sys.argv
    sys.argv = [*map(cut, given)]
    try:
        return wandb.init(**arguments)
    finally:
        sys.argv = given


def open_run(folder: Path, *, offline: bool, **arguments: Any) -> Any:
    """`wandb.init` for a run folder; offline, with a warning, where W&B cannot be reached.

    Args:
        offline: writes to `<folder>/wandb` for `wandb sync`.

    Raises:
        UserError: W&B refuses the key or a setting.
    """
    given = os.environ.get("WANDB_MODE")
    if given == "":
        del os.environ["WANDB_MODE"]  # wandb would end in a validation error
    elif given is not None and given not in MODES:
        raise UserError(f"WANDB_MODE={given} must be one of {', '.join(MODES[:3])}, or unset")
    import wandb
    from pydantic import ValidationError
    from wandb.errors import AuthenticationError, CommError, Error

    folder.mkdir(parents=True, exist_ok=True)
    while list(folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-{arguments.get('id')}")):
        time.sleep(0.1)  # wandb names its folders by the second, and writes over what is there
    mode = "disabled" if given == "disabled" else "offline" if offline else "online"
    try:
        if mode == "online" and (why := _unreachable(wandb.setup().settings.base_url)):
            mode = _offline(folder, why)
        settings = wandb.Settings(init_timeout=START, silent=True)
        try:
            run = _started(wandb, dir=str(folder), mode=mode, settings=settings, **arguments)
        except CommError as error:
            if isinstance(error, AuthenticationError) or re.search(r"\b40[13]\b|permission", str(error)):
                raise
            mode = _offline(folder, _brief(error))
            run = _started(wandb, dir=str(folder), mode=mode, settings=settings, **arguments)
        if mode == "online":
            log.info("W&B: %s", run.url)
        return run
    except ValidationError as error:
        wrong = ", ".join(f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors())
        raise UserError(f"W&B does not take a setting (WANDB_... variables, logger.wandb.*): {wrong}") from None
    except Error as error:
        raise UserError(
            f"W&B refuses the run ({_brief(error)}): log in by `wandb login`, or give logger.wandb.offline=true"
        ) from None


def finish() -> None:
    """Ends this process's run, if it has one, and W&B's service.

    A run that is opened again in the same service while that still closes it loses its rows without a word (wandb
    0.31: every fifth time), and a process that is started from here would share the service.
    """
    if "wandb" in sys.modules:  # else nobody has opened one
        import wandb

        if wandb.run is not None:
            wandb.finish()  # else what it reads of stdout goes to a service that is gone
        wandb.teardown()


def _offline(folder: Path, why: str) -> str:
    log.warning(
        "W&B cannot be reached (%s): continues offline; `wandb sync %s/wandb/offline-run-*` sends it later", why, folder
    )
    return "offline"


def _unreachable(url: str) -> str | None:
    """Why a server does not answer; None where it does, whatever it says."""
    failed = ["no answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=REACH).close()
        except urllib.error.HTTPError:
            failed.clear()
        except (OSError, ValueError) as error:  # URLError among them
            failed[0] = f"{url}: {_brief(getattr(error, 'reason', error))}"
        else:
            failed.clear()

    asking = threading.Thread(target=ask, daemon=True)  # as names are looked up without a limit of time
    asking.start()
    asking.join(REACH)
    return failed[0] if failed else None


def _brief(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
