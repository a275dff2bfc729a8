"""python -m grn.evaluate ckpt=runs/digits_c2i: scores a checkpoint, writes metrics.json (conf/evaluate.yaml).

Also as several processes, by `torchrun --nproc-per-node N -m grn.evaluate ...` or srun (with --kill-on-bad-exit, for
when a process is killed): the images are dealt to them, and the first one writes and prints the same metrics.
"""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from grn.cli.entry import entry_point
from grn.runs.sweeps import objective


@entry_point("evaluate", jointly=True)
def main(config: DictConfig) -> float | list[float] | None:
    config.out = HydraConfig.get().runtime.output_dir  # a sweep's points have a folder each
    if config.get("statistics") is not None:
        from grn.evaluation.statistics import statistics

        statistics(config)
        return None
    from grn.evaluation.evaluate import evaluate

    return objective(evaluate(config), config.monitor)


if __name__ == "__main__":
    main()
