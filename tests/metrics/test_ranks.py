"""Numbers must not depend on the number of ranks: two gloo processes against one."""

import json

import commands
import pytest
import torch
import torch.distributed as dist

from grn.metrics.fid import GenerationScores
from grn.metrics.nearest import NearestTrainingDistance
from grn.metrics.ranks import Rows, Totals
from grn.metrics.reconstruction import ReconstructionScores
from grn.toys.judge import DigitsJudge


def test_rows_keep_their_order_and_reset():
    rows = Rows(3)
    values = torch.arange(15.0).view(5, 3)
    rows.update(values[:2])
    rows.update(values[2:])
    torch.testing.assert_close(rows.gathered(), values)
    rows.reset()
    assert rows.gathered().shape == (0, 3)
    rows.update(values[:1])
    torch.testing.assert_close(rows.gathered(), values[:1])


def test_rows_are_ordered_by_their_ids():
    """Frames of a clip share an id and keep their order."""
    rows, values = Rows(), torch.arange(6.0)
    rows.update(values[:4], torch.tensor([7, 7, -1, 5]))
    rows.update(values[4:], torch.tensor([7, -3]))
    assert rows.gathered().tolist() == [5, 2, 3, 0, 1, 4]


def test_a_single_scalar_row_stays_a_row():
    rows = Rows(dtype=torch.int64)
    rows.update(torch.tensor([2**60 + 1]))
    assert rows.gathered().tolist() == [2**60 + 1]


def test_totals_sum_in_their_dtype():
    totals = Totals(2, dtype=torch.float64)
    for _ in range(3):
        totals.update(torch.tensor([1e-9, 1e9]))
    assert totals.compute().tolist() == pytest.approx([3e-9, 3e9], rel=1e-6)
    totals.reset()
    assert totals.compute().tolist() == [0, 0]


def build(weights, data):
    def split(name):
        images, labels = data[name]
        return lambda: [{"pixels": images, "label": labels}]

    splits = {"train": split("train"), "val": split("val")}
    options = {"kid": True, "kid_subset_size": 50, "prc": True, "val_fid": True}
    fid = GenerationScores(**splits, reference="train", extractor="digits-classifier", weights=weights, **options)
    return {"fid": fid, "judge": DigitsJudge(**splits), "nearest": NearestTrainingDistance(**splits)}


def score(scores, images, labels, real):
    reconstruction = ReconstructionScores()
    for start in range(0, len(images), 16):
        batch = slice(start, start + 16)
        for one in scores.values():
            one.update(images[batch], labels[batch])
        reconstruction.update(real[batch], images[batch])
    values = {name: one.compute() for name, one in scores.items()}
    nearest = scores["nearest"]
    rows = {"distances": nearest.distances().tolist(), "neighbours": nearest.neighbours().tolist()}
    return values | {"reconstruction": reconstruction.compute(), "rows": rows}


def run_rank(rank, ranks, folder, weights, data, images, labels, real):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        scores = build(weights, data)
        results = [score(scores, images[rank::ranks], labels[rank::ranks], real[rank::ranks])]
        for one in scores.values():
            one.reset()
        # A second time with everything on the first rank: the other one has no image at all.
        few = slice(0, 60 if rank == 0 else 0)
        results.append(score(scores, images[few], labels[few], real[few]))
        (folder / f"{rank}.json").write_text(json.dumps(results))
    finally:
        dist.destroy_process_group()


def flat(results):
    numbers = {group: values for group, values in results.items() if group != "rows"}
    return {f"{group}.{name}": value for group, values in numbers.items() for name, value in values.items()}


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(digits, classifier_weights, tmp_path):
    data = {name: (images[:200], labels[:200]) for name, (images, labels) in digits.items()}
    real, labels = (values[200:297] for values in digits["val"])  # 97: the ranks get 49 and 48
    noise = torch.randint(0, 60, real.shape, generator=torch.Generator().manual_seed(0))
    images = (real.int() + noise).clamp(max=255).to(torch.uint8)
    arguments = (2, tmp_path, classifier_weights, data, images, labels, real)
    commands.spawn(run_rank, arguments, nprocs=2)
    one = [score(build(classifier_weights, data), *(x[:n] for x in (images, labels, real))) for n in (97, 60)]
    for rank in range(2):
        for single, several in zip(one, json.loads((tmp_path / f"{rank}.json").read_text())):
            assert flat(several) == pytest.approx(flat(single), rel=1e-6)
            assert several["rows"]["distances"] == pytest.approx(single["rows"]["distances"], rel=1e-6)
            assert several["rows"]["neighbours"] == single["rows"]["neighbours"]
