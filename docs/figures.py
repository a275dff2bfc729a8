"""Draws the figures of docs/method.md and the picture of the README, with the code of the framework itself.

pip install -e '.[studies]' && python docs/figures.py runs/digits_c2i     # after make demo
"""

import argparse
from pathlib import Path

import matplotlib
import torch

from grn import GRNPipeline
from grn.method import hbq
from grn.method.corruption import shift, signal_ratio
from grn.method.schedules import Cosine, EntropyGuided, Linear, Shifted
from grn.sampling.films import state_pixels
from grn.sampling.recording import Recording

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent / "images"
STATE_COLOURS = {"filled": "green", "kept": "blue", "erased": "orange", "blank": "dark"}


def save(figure: plt.Figure, name: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / name, dpi=110, metadata={"Software": None})
    plt.close(figure)


def axes(columns: int, *, width: float = 8, height: float = 2.8):
    figure, drawn = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for axis in drawn:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, drawn


def draw_quantization() -> None:
    """Quantized features and the error that is left, for 1 to 4 rounds."""
    z = torch.linspace(-0.999, 0.999, 2001)
    figure, (left, right) = axes(2)
    for rounds in range(1, 5):
        q = hbq.quantize(z, rounds)
        left.plot(z, q, lw=1, label=f"M = {rounds}")
        right.plot(rounds, (z - q).abs().max(), "o", color=f"C{rounds - 1}")
    bound = torch.arange(1, 9)
    right.plot(bound, 2.0**-bound, "k--", lw=0.8, label="$2^{-M}$")
    left.set(xlabel="z", ylabel="q")
    right.set(xlabel="rounds M", ylabel="largest |z - q|", yscale="log", xticks=bound.tolist())
    left.legend(frameon=False)
    right.legend(frameon=False)
    save(figure, "quantization.png")


def draw_signal_ratios() -> None:
    """Which signal ratios training draws, and what `shift` makes of them."""
    ids = torch.arange(200_000)
    figure, (left, right) = axes(2)
    for name, mean, std in (("classes", -0.8, 0.8), ("text", -1.3, 1.3)):
        t = signal_ratio(0, ids, 0, mean=mean, std=std)
        left.hist(t.numpy(), bins=100, range=(0, 1), density=True, histtype="step", label=name)
    u = torch.linspace(0, 1, 201)
    for alpha in (1, 2, 4, 8):
        right.plot(u, shift(u, alpha), lw=1.2, label=f"a = {alpha}")
    left.set(xlabel="signal ratio t", ylabel="density in training")
    right.set(xlabel="t", ylabel="shift(t, a)")
    left.legend(frameon=False)
    right.legend(frameon=False)
    save(figure, "signal_ratios.png")


def draw_schedules() -> None:
    """How t advances: fixed schedules of 50 steps, and entropy-guided ones of samples that get 20, 35 and 50."""
    figure, (left, right) = axes(2)
    for name, schedule in (
        ("linear", Linear(50)),
        ("cosine", Cosine(50)),
        ("shifted, cap 0.95", Shifted(50, cap=0.95)),
        ("shifted, a = 3, cap 0.95", Shifted(50, alpha=3.0, cap=0.95)),
    ):
        steps = torch.arange(51)
        left.plot(steps, schedule.signal_ratio(steps, torch.full_like(steps, 50)), lw=1.2, label=name)
    adaptive = EntropyGuided()
    for total in (20, 35, 50):
        steps = torch.arange(total + 1)
        right.plot(steps, adaptive.signal_ratio(steps, torch.full_like(steps, total)), lw=1.2, label=f"{total} steps")
    right.axvline(adaptive.warmup, color="k", ls=":", lw=0.8)
    right.annotate("the entropy decides", (adaptive.warmup + 1, 0.02), fontsize=8)
    left.set(xlabel="step", ylabel="signal ratio t", title="fixed")
    right.set(xlabel="step", title="entropy-guided")
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    save(figure, "schedules.png")


def draw_refinement(ckpt: str, labels: tuple[int, ...] = (3, 8), seed: int = 4, columns: int = 8) -> None:
    """One refinement: the prediction of some steps, and what each step makes of its tokens."""
    pipe = GRNPipeline.from_pretrained(ckpt)
    recording = Recording()
    for step in pipe.stream(pipe.request(labels=list(labels), seed=seed)):
        recording(step)
    count = len(recording.moments)
    chosen = [round(i * (count - 1) / (columns - 1)) for i in range(columns)]
    figure, drawn = plt.subplots(
        2 * len(labels), columns, figsize=(columns * 1.1, len(labels) * 2.3), layout="constrained"
    )
    for column, number in enumerate(chosen):
        moment = recording.moments[number]
        pixels = pipe.decode(recording.with_prefix(moment.predicted))[:, -1].movedim(1, -1).numpy()
        states = state_pixels(moment.states, pixels.shape[1:3])
        states = states.reshape(len(labels), 3, *pixels.shape[1:3]).movedim(1, -1).cpu().numpy()
        for row in range(len(labels)):
            drawn[2 * row, column].imshow(pixels[row])
            drawn[2 * row + 1, column].imshow(states[row], interpolation="nearest")
        taken, t = int(moment.taken.max()), float(moment.t.max())
        drawn[0, column].set_title(f"step {taken}\nt = {t:.2f}", fontsize=8)
    for axis in drawn.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row in range(len(labels)):
        drawn[2 * row, 0].set_ylabel("prediction", fontsize=8)
        drawn[2 * row + 1, 0].set_ylabel("tokens", fontsize=8)
    save(figure, "refinement.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", nargs="?", help="a trained digits_c2i, for refinement.png; without one the others")
    ckpt = parser.parse_args().ckpt
    draw_quantization()
    draw_signal_ratios()
    draw_schedules()
    if ckpt:
        draw_refinement(ckpt)


if __name__ == "__main__":
    main()
