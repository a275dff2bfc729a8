"""python -m grn.sample ckpt=runs/digits_c2i labels=[3,7] num=16: pictures from a trained refiner (conf/sample.yaml).

Of a text refiner: python -m grn.sample ckpt=runs/digits_t2i prompts=["a three left of an eight"]; of one of clips:
python -m grn.sample ckpt=runs/digits_t2v prompts=["a five falling"] frames=17, an mp4 each.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("sample")
def main(config: DictConfig) -> None:
    from grn.sampling.sample import sample

    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    sample(config)


if __name__ == "__main__":
    main()
