"""grn <command> key=value ...: the commands by one name; `grn train ...` is `python -m grn.train ...`."""

import os
import runpy
import sys

import grn

COMMANDS = {
    "prepare": "write webdataset shards from folders of images or clips, or of digits",
    "train": "train a tokenizer or a refiner",
    "encode": "write token shards from pixel shards",
    "sample": "draw images or clips from a trained refiner",
    "evaluate": "score a checkpoint: FID, PSNR and others",
    "compare": "what differs between evaluations: settings, metrics, same-seed samples",
    "ls": "the runs of a folder: steps, scores, pictures",
    "info": "what a checkpoint is: network, step, tokenizer, sampler",
    "studio": "watch samples being refined in the browser, erase and refine on",
    "calibrate": "fit adaptive step counts to a mean number of steps",
    "export": "write a trained network as a folder to share, or as an official file",
    "consolidate": "make a single file of a sharded checkpoint",
    "bench": "measure speed and memory on this machine",
    "demo": "all of it on handwritten digits, in minutes; it takes no keys",
}
USAGE = f"""usage: grn COMMAND [key=value ...]

{chr(10).join(f"  {name:<12} {what}" for name, what in COMMANDS.items())}

grn COMMAND --help lists its keys. Completion for bash: eval "$(grn -sc install=bash)" (also zsh and fish).
"""
COMPLETION = ("-sc", "--shell-completion", "--shell_completion")


def main() -> None:
    """The console script."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in COMPLETION:
        _complete(rest)
    elif command in COMMANDS:
        _run(command, rest)
    elif command == "--version":
        print(f"grn {grn.__version__}")
    elif command in ("-h", "--help"):
        print(USAGE, end="")
    else:
        sys.exit(f"error: no command {command}; there is {', '.join(COMMANDS)}")


def _run(command: str, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    runpy.run_module(f"grn.{command}", run_name="__main__", alter_sys=True)  # to the letter what python -m does


def _complete(arguments: list[str]) -> None:
    """Hydra's completion, which knows programs of one config: it is asked for the command that stands in the line."""
    words = os.environ.get("COMP_LINE", "").split()
    started = len(words) > 2 or (len(words) == 2 and os.environ["COMP_LINE"].endswith(" "))
    if not any(argument.startswith("query=") for argument in arguments):
        _run("train", [COMPLETION[0], *arguments])
    elif not started:
        print(" ".join(COMMANDS))
    elif words[1] in COMMANDS and words[1] != "demo":
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(f"{words[0]} {words[1]}", f"grn-{words[1]}", 1)
        _run(words[1], [COMPLETION[0], *arguments])


if __name__ == "__main__":
    main()
