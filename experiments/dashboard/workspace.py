"""Makes the W&B workspace of this project's runs: python experiments/dashboard/workspace.py --entity TEAM

Needs: pip install 'grn[dashboard]', and somebody who is logged in. Without `--entity`, prints what it would save.
"""

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

# section -> (title, curves) of its plots; what a run does not log stays empty.
PLOTS = {
    "Refiner": [
        ("token accuracy by signal ratio", [f"train/accuracy/t_0.{bin}" for bin in range(10)]),
        ("cross-entropy", ["train/loss", "val/loss"]),
        ("token accuracy", ["train/accuracy/mean", "val/accuracy"]),
    ],
    "Samples": [
        ("FID", ["eval/fid"]),
        ("inception score", ["eval/isc_mean"]),
        ("steps a sample", ["eval/steps_min", "eval/steps_mean", "eval/steps_max"]),
        ("digits: read as asked for", ["eval/judge_accuracy"]),
    ],
    "Tokenizer": [
        ("PSNR", ["val/psnr"]),
        ("SSIM", ["val/ssim"]),
        ("losses", ["train/l1", "train/lpips", "train/gan", "train/discriminator"]),
    ],
    "Machine": [
        ("images per second", ["train/images_per_second"]),
        ("share of the peak", ["train/mfu"]),
        ("gradient norm", ["train/grad_norm"]),
        ("learning rate", ["train/lr"]),
        ("samples that could not be read", ["data/skipped"]),
    ],
}
MEDIA = {"Samples": ["sample/grid", "sample/film"], "Tokenizer": ["reconstruction/grid"]}


def workspace(entity: str, project: str) -> ws.Workspace:
    """A section for each of `PLOTS`, its pictures first, over optimizer steps, runs grouped by their experiment."""
    sections = []
    for name, plots in PLOTS.items():
        panels = [wr.MediaBrowser(title=key, media_keys=[key], num_columns=1) for key in MEDIA.get(name, [])]
        panels += [wr.LinePlot(title=title, x="trainer/global_step", y=curves) for title, curves in plots]
        sections.append(ws.Section(name=name, panels=panels, is_open=True))
    return ws.Workspace(
        entity=entity,
        project=project,
        name="GRN",
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entity", help="user or team to save it to")
    parser.add_argument("--project", default="grn")
    given = parser.parse_args()
    built = workspace(given.entity or "nobody", given.project)
    if given.entity:
        built.save()
    else:
        print(built._to_model().model_dump_json(by_alias=True, indent=2))
