"""python -m grn.encode ckpt=runs/digits_tokenizer data=digits: pixel shards -> token shards (conf/encode.yaml)."""

from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("encode", writes="out")
def main(config: DictConfig) -> None:
    from grn.data.prepare.encode import encode

    encode(config)


if __name__ == "__main__":
    main()
