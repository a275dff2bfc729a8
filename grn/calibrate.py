"""python -m grn.calibrate ckpt=runs/digits_c2i target_steps=20: fits entropy-guided sampling (conf/calibrate.yaml).

Several processes, by torchrun or srun, share the samples.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grn.cli.entry import entry_point


@entry_point("calibrate", jointly=True)
def main(config: DictConfig) -> None:
    from grn.sampling.calibrate import calibrate

    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    calibrate(config)


if __name__ == "__main__":
    main()
