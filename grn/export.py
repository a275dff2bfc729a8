"""python -m grn.export ckpt=runs/digits_c2i: a trained refiner or tokenizer as a folder to share (conf/export.yaml)."""

from pathlib import Path

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("export", writes="out")
def main(config: DictConfig) -> None:
    from grn.evaluation.model_card import write_card
    from grn.training.export import export

    out = export(config)
    if config.card and out.is_dir():
        write_card(out, results=Path(config.results).expanduser(), license=config.license)


if __name__ == "__main__":
    main()
