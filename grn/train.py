"""python -m grn.train +experiment=digits_c2i: trains a tokenizer or a refiner (config: conf/train.yaml)."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.runs.resuming import check_resumable
from grn.runs.sweeps import objective


@entry_point("train")
def main(config: DictConfig) -> float | list[float] | None:
    config.paths.run = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    if config.ckpt_path is not None:  # a file that is missing; what else is wrong is told in its turn
        check_resumable(config)
    from grn.training.train import train

    return objective(train(config), config.monitor)


if __name__ == "__main__":
    main()
