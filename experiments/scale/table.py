"""The table of docs/cluster.md, from grn.bench benchmark=scale: make scale."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- make scale -->\n", "<!-- end -->\n"
MODELS = {
    "G": "class_refiner_G",
    "2B": "text_refiner_2B benchmark.averages=1",
    "8B": "text_refiner_8B benchmark.averages=1",
}
PARTS = ("weights", "gradients", "optimizer", "averages", "activations")


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}" if count < 9.995e9 else f"{count / 1e9:.1f}"


def main() -> None:
    lines, commands = [], []
    for name, model in MODELS.items():
        for shard_size in (None, 16):
            arguments = f"benchmark=scale model={model}" + (f" benchmark.shard_size={shard_size}" if shard_size else "")
            out = ROOT / "build" / "scale" / f"{name}-{shard_size or 'all'}"
            subprocess.run([sys.executable, "-m", "grn.bench", *arguments.split(), f"out={out}"], check=True, cwd=ROOT)
            report = json.loads((out / "bench.json").read_text())
            for row in report["ranks"]:
                parts = [gigabytes(row["bytes"][part]) for part in PARTS]
                whole = [gigabytes(row["peak_bytes"]), gigabytes(sum(row["received_bytes"].values()))]
                cells = [name, str(shard_size or 64), str(row["rank"]), *parts, *whole]
                lines.append("| " + " | ".join(cells) + " |\n")
            checkpoint = report["checkpoint"]
            size, each = gigabytes(checkpoint["bytes"]), gigabytes(checkpoint["bytes_of_a_file"])
            commands.append(
                f"| {name}, {shard_size or 64} | {report['step']} | {size} GB, {checkpoint['files']} files of {each} | "
                f"`python -m grn.bench {arguments}` |\n"
            )
    table = "| | copy | rank | weights | gradients | optimizer | averages | all else | peak | received |\n"
    table += "|---|---|---|---|---|---|---|---|---|---|\n" + "".join(lines)
    table += "\n| | a rank's step | checkpoint | command |\n|---|---|---|---|\n" + "".join(commands)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table + END + after)


if __name__ == "__main__":
    main()
