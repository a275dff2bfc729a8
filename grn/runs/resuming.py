"""Where a run goes on, told before torch is imported."""

from pathlib import Path

from omegaconf import DictConfig

from grn.runtime.errors import UserError
from grn.weights.integrity import LAST, PREVIOUS
from grn.weights.kinds import is_checkpoint


def check_resumable(config: DictConfig) -> Path | None:
    """The checkpoint that `ckpt_path` means; None to start over.

    Raises:
        UserError: it is not there, which `auto` alone takes for a start over, or the run folder holds a run that this
            one would overwrite.
    """
    folder, wanted = Path(config.paths.run) / "checkpoints", config.ckpt_path
    if wanted is None:
        if any(folder.glob("*.ckpt")) and not config.overwrite:
            raise UserError(
                f"{config.paths.run} already holds a run: resume it with ckpt_path=last, choose another name=..., "
                "or start over with overwrite=true"
            )
        if earlier := sorted(folder.glob("step_*.ckpt")):
            raise UserError(
                f"overwrite=true leaves milestones where they are: remove {earlier[0]} and the others of the "
                "earlier run (step_*.ckpt), or choose another name=..."
            )
        return None
    path = Path(wanted)
    if wanted in ("last", "best", "previous", "auto"):
        path = folder / (LAST if wanted == "auto" else f"{wanted}.ckpt")
    if path.is_symlink() and not path.exists():
        raise UserError(f"ckpt_path={wanted}: {path} is a link to {path.readlink()}, which is not there: put it back")
    if is_checkpoint(path):
        return path
    if wanted != "auto":
        raise UserError(f"ckpt_path={wanted}: there is no {path}; leave ckpt_path out to start over")
    if is_checkpoint(path.with_name(PREVIOUS)):
        raise UserError(f"ckpt_path=auto: there is no {path}, but the one before: resume with ckpt_path=previous")
    return None
