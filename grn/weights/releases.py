"""The authors' weights as they can be downloaded: one table of what each task needs, without torch.

A new release of theirs is one more line of `RELEASES`. File names and sampling settings are those of their scripts;
file names are patterns where an epoch is not known. No hash is known to us yet, so none is checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn.runtime.errors import UserError
from grn.weights.kinds import HUB

REPOSITORY = "bytedance-research/GRN"  # on the Hugging Face Hub

# In our words; the authors' scripts for clips have a longer list of this kind, which is theirs to be read.
NEGATIVE_PROMPT = (
    "low quality, blurry, noisy, compression artifacts, overexposed, washed out colors, flat lighting, cartoon, 3d "
    "render, waxy skin, deformed hands, extra fingers, extra limbs, distorted face, static picture, jerky motion, "
    "flicker, text, watermark, logo, cluttered background"
)


@dataclass(frozen=True)
class File:
    """A file of a release: its path in the repository, `*` for what is not known of it; sha256 where that is known."""

    path: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Release:
    """What one task of one size is made of.

    Args:
        refiner, tokenizer: the files of the two networks.
        models: constructor's arguments of the refiner; of several definitions, the one whose shapes the file has.
        tokenizer_model: likewise of the tokenizer.
        encoder: of text: the file of the text encoder, and `encoder_tokenizer`, the folder of its tokenizer.
        sampler: as `model_index.json` holds one (grn.checkpoints.exported).
        prompt_prefix, prompt_suffix: what prompts stand between, as captions did in training.
        size: (height, width) of samples in pixels, where nobody asks for another.
        frames: of samples, 1 for images.
        context_latents: first latents that samples may be given: 1 of image to video.
    """

    refiner: File
    tokenizer: File
    models: tuple[Mapping[str, Any], ...]
    tokenizer_model: Mapping[str, Any]
    sampler: Mapping[str, Any]
    encoder: File | None = None
    encoder_tokenizer: str = ""
    prompts: tuple[str, ...] = ("an astronaut riding a horse",)
    prompt_prefix: str = ""
    prompt_suffix: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] = (256, 256)
    frames: int = 1
    context_latents: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of all that is read of the repository."""
        text = () if self.encoder is None else (self.encoder.path, f"{self.encoder_tokenizer}/*")
        return (self.refiner.path, self.tokenizer.path, *text)


def _class_refiner(depth: int, width: int, heads: int, bottleneck: int, context_start: int) -> dict[str, Any]:
    sizes = {"depth": depth, "width": width, "heads": heads, "bottleneck": bottleneck, "context_start": context_start}
    return sizes | {
        "channels": 16,
        "classes": 16,
        "num_labels": 1000,
        "size": 16,
        "context_tokens": 32,
        "mlp_ratio": 4.0,
    }


def _text_refiner(depth: int, width: int, heads: int, mlp_ratio: float, kv_heads: int | None = None) -> dict[str, Any]:
    sizes = {"depth": depth, "width": width, "heads": heads, "kv_heads": kv_heads, "mlp_ratio": mlp_ratio}
    return sizes | {"channels": 256, "classes": 2, "text_width": 4096, "max_text": 512, "attention": "full"}


def _text_sampler(temperature: float) -> dict[str, Any]:
    schedule = {"_class_name": "Shifted", "steps": 50, "alpha": 1.0, "cap": 0.95}
    return {"schedule": schedule, "guidance": 3.0, "temperature": temperature, "guidance_interval": (0.0, 1.0)}


def _class_sampler(temperature: float, guidance: float, low: float) -> dict[str, Any]:
    schedule = {"_class_name": "Linear", "steps": 50}
    return {
        "schedule": schedule,
        "guidance": guidance,
        "temperature": temperature,
        "guidance_interval": (low, 1.0),
    }


_IMAGE_TOKENIZER = {
    "latent_channels": 16,
    "rounds": 4,
    "dim": 160,
    "decoder_dim": 256,
    "multipliers": (1, 2, 4, 4),
    "blocks_per_stage": 2,
    "temporal": (False, True, True),
}
_OF_CLASSES = {"tokenizer": File("HBQ_image_tokenizer_16dim_M4.ckpt"), "tokenizer_model": _IMAGE_TOKENIZER}
_OF_TEXT = {
    "tokenizer": File("HBQ_image_video_tokenizer_64dim_M4_20260626.ckpt"),
    "tokenizer_model": _IMAGE_TOKENIZER | {"latent_channels": 64},
    "encoder": File("umt5-xxl/models_t5_umt5-xxl-enc-bf16.pth"),
    "encoder_tokenizer": "umt5-xxl/umt5-xxl",
}
_OF_CLIPS = {
    **_OF_TEXT,
    "negative_prompt": NEGATIVE_PROMPT,
    "sampler": _text_sampler(1.0),
    "size": (480, 848),  # 9:16 at 0.41M
    "frames": 33,  # two seconds
}
_2B = (_text_refiner(28, 2304, 18, 3.55),)
# Which of the two definitions of 8B the authors' file has is not known: its shapes tell.
_8B = (_text_refiner(36, 4096, 32, 3.0), _text_refiner(36, 4096, 32, 4.0, kv_heads=8))
_8B_FILE = File("GRN_T2V_TITAN_FSA_sft10600_ema.pth")
_OF_8B = {**_OF_CLIPS, "refiner": _8B_FILE, "models": _8B}
_QUALITY = " high aesthetic and high quality video."

# By task and size; the first size of a task is the one that is taken where none is asked for.
RELEASES: dict[tuple[str, str], Release] = {
    ("t2i", "2B"): Release(
        **_OF_TEXT,
        refiner=File("GRN_T2I_2B_FSA_251600.pth"),
        models=_2B,
        sampler=_text_sampler(1.1),
        prompt_prefix="<T2I>",
        size=(1024, 1024),
    ),
    ("t2i", "8B"): Release(
        **(_OF_8B | {"negative_prompt": "", "sampler": _text_sampler(1.1), "size": (1024, 1024), "frames": 1}),
        prompt_prefix="<T2I>",
    ),
    ("t2v", "2B"): Release(
        **_OF_CLIPS,
        refiner=File("GRN_T2V_2B_FSA_sft147400_ema.pth"),
        models=_2B,
        prompt_prefix="<T2V>",
        prompt_suffix=". The quality is very high!",
    ),
    ("t2v", "8B"): Release(**_OF_8B, prompt_prefix="<T2V>", prompt_suffix=_QUALITY),
    ("i2v", "8B"): Release(**_OF_8B, prompt_prefix="<I2V>", prompt_suffix=_QUALITY, context_latents=1),
    ("c2i", "B"): Release(
        **_OF_CLASSES,
        refiner=File("GRN_ind_B_ep599.pth"),
        models=(_class_refiner(12, 768, 12, 128, 4),),
        sampler=_class_sampler(1.31, 2.35, 0.44),
    ),
    ("c2i", "L"): Release(
        **_OF_CLASSES,
        refiner=File("GRN_ind_L_ep599.pth"),
        models=(_class_refiner(24, 1024, 16, 128, 8),),
        sampler=_class_sampler(1.3, 2.0, 0.42),
    ),
    ("c2i", "H"): Release(
        **_OF_CLASSES,
        refiner=File("GRN_ind_H_ep*.pth"),
        models=(_class_refiner(32, 1280, 16, 256, 10),),
        sampler=_class_sampler(1.3, 2.0, 0.42),  # L's: H's are not published
    ),
}


def check_task_given(ckpt: str) -> None:
    """Raises:
    UserError: `ckpt` is the authors' repository, or a folder of their files, of which a task must be chosen.
    """
    if ckpt.removeprefix(HUB) == REPOSITORY:
        is_theirs = ckpt.startswith(HUB) or not Path(ckpt).exists()
    else:
        folder = Path(ckpt).expanduser()
        is_theirs = folder.is_dir() and any(any(folder.glob(it.refiner.path)) for it in RELEASES.values())
    if is_theirs:
        tasks = ", ".join(dict.fromkeys(f"task={task}" for task, _ in RELEASES))
        raise UserError(f"ckpt={ckpt} has the authors' weights of several tasks: give one of {tasks}")


def find_release(task: str, size: str | None = None, *, size_key: str = "size") -> tuple[str, Release]:
    """(Its size, the release) of a task; None: the task's first size.

    Args:
        size_key: what the user calls `size`.

    Raises:
        UserError: no such task or size.
    """
    sizes = [known for of, known in RELEASES if of == task]
    if not sizes:
        raise UserError(f"task={task}: choose among {', '.join(dict.fromkeys(of for of, _ in RELEASES))}")
    if size is not None and size not in sizes:
        raise UserError(f"{size_key}={size}: of task={task} the authors' weights have {', '.join(sizes)}")
    size = sizes[0] if size is None else size
    return size, RELEASES[task, size]
