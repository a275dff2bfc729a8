"""python -m grn.bench benchmark=tokenizer: speed and memory on this machine, into bench.json (conf/bench.yaml)."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("bench")
def main(config: DictConfig) -> None:
    from grn.benchmarks.bench import bench

    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    bench(config)


if __name__ == "__main__":
    main()
