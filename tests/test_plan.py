"""plan.py: every row fits its bucket's shape, few shapes serve many sizes, and little of them is padding."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_r1_jax import examples, grid, labellist, options, pipeline, plan, records, synth

LABELS = SHARED / "data" / "endovis18" / "labels_train.txt"


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synth.write(root, frames=9, seed=5, size=(84, 56), max_tools=3, sequences=("seq_2", "seq_3"))
    return records.read(root)


def config(**more):
    return options.Data(root="data", **{"frames": 4, "questions": 3, **more})


# Rows and lanes


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 9), st.none() | st.integers(0, 9))
def test_rows_share_the_questions_out_evenly(counts, questions, seed):
    record = records.Record("q", "Idle", (0, 0, 1, 1), 1, None, "f:1")
    frames = [records.Frame(f"s/{n}", "s", None, 1, 1, (record,) * count) for n, count in enumerate(counts)]
    rows = plan.plan_rows(frames, questions, seed)
    for number, count in enumerate(counts):
        parts = [row.records for row in rows if row.frame == number]
        assert sorted(index for part in parts for index in part) == list(range(count))
        assert len(parts) == -(-count // questions)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if seed is None:
        assert [index for row in rows for index in row.records] == [i for count in counts for i in range(count)]


def test_the_shape_is_the_tightest_that_holds_everything(encoder, frames):
    stream = pipeline.training(frames, encoder, config(frames=8, questions=9), options.Targets(), seed=0)
    (shape,) = stream.shapes
    batches = [stream[number] for number in range(3)]
    lanes = np.concatenate([(batch.branch_segment_BJT > 0).any(-1).sum(-1) for batch in batches])
    tokens = np.concatenate([(batch.branch_segment_BJT > 0).sum(-1).ravel() for batch in batches])
    scored = np.concatenate([batch.score_weight_BL.sum(-1) for batch in batches])
    assert lanes.max() == shape.lanes
    assert tokens.max() <= shape.lane_tokens
    assert shape.scored - 8 < scored.max() <= shape.scored
    assert all(batch.prefix_mask_BP.sum(-1).max() > shape.prefix - 8 for batch in batches)


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=6), min_size=1, max_size=12))
def test_lanes_hold_every_row_in_little_more_than_the_fullest_takes(lengths):
    lanes, room = plan.plan_lanes(lengths)
    assert room % 8 == 0
    assert all(len(examples.pack(row, room)) <= lanes for row in lengths)
    fullest = plan.round_up(max(map(sum, lengths)), 8)
    assert max(map(sum, lengths)) <= lanes * room <= fullest * (1 + fullest / plan.REACH)


def test_short_branches_share_a_lane():
    assert plan.plan_lanes([[19, 18, 20, 18], [18, 18]]) == (2, 40)
    assert plan.plan_lanes([[20], [17]]) == (1, 24)


# Buckets


def padded(extents, groups):
    """Tokens of all rows, each as large as the largest of its group: what `group` is to make small."""
    largest = [extents[members].max(0) for members in groups]
    return sum(len(m) * (e[0] + e[1] + e[2] * e[3]) for m, e in zip(groups, largest, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_buckets_hold_every_row_once_in_whole_batches(count, frames, most, seed):
    rng = np.random.default_rng(seed)
    extents = np.stack([*rng.integers(1, 100, (3, count)), np.ones(count, int)], -1).astype(float)
    groups = plan.group(extents, np.ones(count), frames=frames, most=most)
    assert sorted(np.concatenate(groups)) == list(range(count)) and len(groups) <= most
    assert sum(len(members) % frames > 0 for members in groups) <= 1
    if len(groups) > 1:
        assert min(map(len, groups)) >= plan.LEAST_BATCHES * frames
        fewer = plan.group(extents, np.ones(count), frames=frames, most=len(groups) - 1)
        assert padded(extents, groups) < padded(extents, fewer) * (1 - plan.LITTLE / 2)


def test_the_first_cut_is_the_best_of_all():
    """Held against trying every cut along every axis."""
    rng = np.random.default_rng(3)
    extents = np.stack([*rng.integers(1, 100, (3, 60)), rng.integers(1, 4, 60)], -1).astype(float)
    best = np.inf
    for axis in range(4):
        order = np.argsort(extents[:, axis], kind="stable")
        best = min(best, *(padded(extents, [order[:cut], order[cut:]]) for cut in range(8, 53, 2)))
    assert padded(extents, plan.group(extents, np.ones(60), frames=2, most=2)) == best


def test_rows_alike_stay_in_one_bucket():
    assert len(plan.group(np.ones((400, 4)), np.ones(400), frames=2, most=8)) == 1
    nearly = np.ones((400, 4)) * 100
    nearly[:200, 1] = 101  # less than LITTLE of all
    assert len(plan.group(nearly, np.ones(400), frames=2, most=8)) == 1


@pytest.mark.parametrize("most", [1, 3])
def test_200_image_sizes_are_compiled_once_a_bucket_and_every_row_fits(encoder, frames, most):
    rng = np.random.default_rng(0)
    sizes = rng.integers(60, 400, (200, 2))
    pixels = dataclasses.replace(encoder.preprocessor, min_pixels=28 * 28, max_pixels=28 * 28 * 60)
    unseeing = dataclasses.replace(encoder, preprocessor=pixels, blank=True)
    mixed = [
        dataclasses.replace(frames[i % 9], width=int(width), height=int(height))
        for i, (width, height) in enumerate(sizes)
    ]
    stream = pipeline.training(mixed, unseeing, config(buckets=most, questions=9), options.Targets(), seed=0)
    shapes = []

    @jax.jit
    def step(patches_BWSC, ids_BP, segment_BJT, slot_BL):
        shapes.append((patches_BWSC.shape[1], ids_BP.shape[1], *segment_BJT.shape[1:], slot_BL.shape[1]))
        return patches_BWSC.sum() + ids_BP.sum() + segment_BJT.sum() + slot_BL.sum()

    for number in range(200 // 4):
        batch = stream[number]  # raises where a row does not fit
        step(batch.patches_BWSC, batch.prefix_ids_BP, batch.branch_segment_BJT, batch.score_slot_BL)
    assert step._cache_size() == len(shapes) == len(stream.shapes) == most
    assert set(shapes) == {tuple(shape) for shape in stream.shapes}
    merge = pixels.merge_size
    for bucket in stream.plan.buckets:
        grids = [unseeing.patch_grid(mixed[row.frame]) for (*rows,) in bucket.rows for row in rows]
        assert max(grid.count_windows([g], encoder.window_side, merge) for g in grids) == bucket.shape.windows
        assert 0 <= bucket.shape.prefix - max(len(unseeing.prefix_ids([g])) for g in grids) < 8


def test_padding_is_told_as_it_is_in_the_batches(encoder, frames):
    """An epoch of whole batches has exactly the padding that the plan tells."""
    many = [dataclasses.replace(frames[i % 9], records=frames[i % 9].records[: 1 + i % 5]) for i in range(64)]
    stream = pipeline.training(many, encoder, config(buckets=3, questions=9), options.Targets(reasoning=0.5), seed=0)
    assert len(stream.shapes) == 3 and stream.plan.rows == 64
    batches = [stream[number] for number in range(16)]
    told = stream.plan.padding
    for name, filled in (
        ("prefix_padding", [batch.prefix_mask_BP for batch in batches]),
        ("branch_padding", [batch.branch_segment_BJT > 0 for batch in batches]),
    ):
        assert told[name] == pytest.approx(1 - sum(f.sum() for f in filled) / sum(f.size for f in filled))
    *lines, last = stream.plan.lines()
    assert len(lines) == 3 and last.startswith("3 shapes, 64 rows; prefix padding ")
    assert f"branch padding {told['branch_padding']:.1%}" in last
    assert stream.shapes[stream.plan.largest].lane_tokens == max(shape.lane_tokens for shape in stream.shapes)


def test_branches_of_the_real_label_distribution_leave_little_padding(encoder):
    """1,560 frames with 3 to 9 questions, half of the answers reasoned; `LABELS` thinned to every fourth frame."""
    if not LABELS.is_file():
        pytest.skip(f"the real label list is not here: {LABELS}")
    frames = labellist.read(LABELS)[::4]
    assert {len(frame.records) for frame in frames} == {3, 5, 7, 9}
    targets = options.Targets(reasoning=0.5)
    padding = {
        most: pipeline.training(frames, encoder, config(questions=9, buckets=most), targets, seed=0).plan.padding
        for most in (1, options.Data(root="").buckets)
    }
    told = [values["branch_padding"] for values in padding.values()]
    assert told[0] > 0.3 and told[1] < 0.15
    assert padding[1]["prefix_padding"] < 0.15
