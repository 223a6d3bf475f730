"""pipeline.py: every question counted once, the same stream for any number of processes, and back to any position."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from surgery_r1_jax import (
    answer,
    examples,
    options,
    pipeline,
    prepared,
    reasoning,
    records,
    synth,
    vocabulary,
)
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.plan import Row, plan_rows
from surgery_r1_jax.stream import Shard

FRAMES = 9


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    synth.write(root, frames=FRAMES, seed=5, size=(84, 56), max_tools=3, sequences=("seq_2", "seq_3"))
    return records.read(root)


def config(**more):
    return options.Data(**{"root": "data", "frames": 4, "questions": 3, **more})


def take(stream, count, taken=0):
    with stream.starting(taken) as batches:
        return [next(batches) for _ in range(count)]


def asked(gold):
    """The (frame, record) pairs that a batch asks, in its order."""
    return [
        (int(number), int(index))
        for number, indices, valid in zip(gold.frame_B, gold.record_BQ, gold.valid_BQ, strict=True)
        for index in indices[valid]
    ]


def rows_asked(batches):
    """The rows in the batches, in their order."""
    for _, gold in batches:
        for number, indices, valid in zip(gold.frame_B, gold.record_BQ, gold.valid_BQ, strict=True):
            yield Row(int(number), tuple(indices[valid].tolist()))


def leaves(batch):
    return [leaf for field in batch for leaf in (field if isinstance(field, tuple) else (field,))]


def assert_same(found, want):
    for ours, theirs in zip(found, want, strict=True):
        for a, b in zip(leaves(ours), leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


# Once


@pytest.mark.parametrize("count", range(1, 8))  # 1 .. 3 B + 1 frames
@pytest.mark.parametrize("questions", [9, 3])
def test_every_question_is_asked_once_and_in_order(encoder, frames, count, questions):
    chosen = frames[:count]
    batches, number = pipeline.once(chosen, encoder, config(frames=2, questions=questions))
    batches = list(batches)
    assert len(batches) == number
    found = [pair for _, gold in batches for pair in asked(gold)]
    assert found == [(i, j) for i, frame in enumerate(chosen) for j in range(len(frame.records))]
    assert len({tuple((leaf.shape, leaf.dtype) for leaf in leaves((*p, *g))) for p, g in batches}) == 1
    for prompts, gold in batches:
        missing = gold.frame_B < 0
        assert not prompts.prefix_mask_BP[missing].any() and not prompts.patch_image_BWS[missing].any()
        np.testing.assert_array_equal((prompts.branch_segment_BJT > 0).any(-1), gold.valid_BQ)
        np.testing.assert_array_equal(gold.answer_BQ >= 0, gold.valid_BQ)
    assert not any((gold.frame_B < 0).any() for _, gold in batches[:-1]), "only the last batch is padded"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_processes_share_an_evaluation_out_without_gaps(encoder, frames, count):
    whole, number = pipeline.once(frames[:count], encoder, config())
    parts = [pipeline.once(frames[:count], encoder, config(), Shard(i, 2)) for i in range(2)]
    assert [n for _, n in parts] == [number] * 2
    for (prompts, gold), *halves in zip(whole, *(batches for batches, _ in parts), strict=True):
        for name in ("prompts", "gold"):
            fields = [half[name == "gold"] for half in halves]
            joined = [np.concatenate(pair) for pair in zip(*fields, strict=True)]
            assert_same([joined], [gold if name == "gold" else prompts])


# Streams


@pytest.mark.parametrize("shards", [2, 4])
def test_processes_partition_every_batch_of_the_stream(encoder, frames, shards):
    """Across an epoch's edge too: the rows do not divide by the batch, nor by the processes."""
    make = lambda shard: pipeline.rollouts(frames, encoder, config(), seed=3, shard=shard)  # noqa: E731
    rows = plan_rows(frames, 3, 3)
    steps = 2 * len(rows) // 4 + 1
    assert len(rows) % 4
    parts = zip(*(take(make(Shard(i, shards)), steps) for i in range(shards)), strict=True)
    for whole, part in zip(take(make(Shard()), steps), parts, strict=True):
        for field, pieces in zip(leaves(whole), zip(*map(leaves, part), strict=True), strict=True):
            np.testing.assert_array_equal(np.concatenate(pieces), field)


@pytest.mark.parametrize("frames_in_batch", [3, 4, 5])
def test_an_epoch_has_every_row_once_in_an_order_of_its_own(encoder, frames, frames_in_batch):
    rows = plan_rows(frames, 3, 7)
    stream = pipeline.rollouts(frames, encoder, config(frames=frames_in_batch), seed=7)
    seen = list(rows_asked(take(stream, -(-4 * len(rows) // frames_in_batch))))
    epochs = [seen[i * len(rows) :][: len(rows)] for i in range(4)]
    assert all(Counter(epoch) == Counter(rows) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4 and rows not in epochs
    asked = Counter((row.frame, index) for row in rows for index in row.records)
    assert asked == Counter((i, j) for i, frame in enumerate(frames) for j in range(len(frame.records)))


def test_a_seed_fixes_the_stream_and_another_changes_it(encoder, frames):
    def batches(seed, threads=2):
        return take(pipeline.rollouts(frames, encoder, config(threads=threads), seed=seed), 6)

    first = batches(1)
    assert_same(
        [pair for batch in batches(1, threads=1) for pair in batch], [pair for batch in first for pair in batch]
    )
    assert list(rows_asked(batches(2))) != list(rows_asked(first))


def test_a_batch_larger_than_the_data_is_refused_with_a_remedy(encoder, frames):
    rows = len(plan_rows(frames, 3, 0))
    pipeline.rollouts(frames, encoder, config(frames=rows), seed=0)
    reason = rf"data: {rows} rows of frames do not fill a batch of {rows + 1}; lower data\.frames"
    with pytest.raises(InputError, match=reason):
        pipeline.rollouts(frames, encoder, config(frames=rows + 1), seed=0)
    with pytest.raises(InputError, match=reason):
        pipeline.training(frames, encoder, config(frames=rows + 1), options.Targets(), seed=0)


def test_a_batch_that_processes_cannot_share_is_refused(encoder, frames):
    for make in (
        lambda shard: pipeline.rollouts(frames, encoder, config(), seed=0, shard=shard),
        lambda shard: pipeline.once(frames, encoder, config(), shard),
    ):
        with pytest.raises(InputError, match=r"data\.frames 4 cannot be shared out over 3 processes"):
            make(Shard(0, 3))


# Several sources, epochs, state


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two data sets in one configuration, of 14 and 7 frames."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, count in (("one", 14), ("two", 7)):
        synth.write(folder / name, frames=count, seed=count, size=(84, 56), max_tools=3, sequences=("seq_2",))
    sources = options.Source(root=str(folder / "one"), weight=2.0), options.Source(root=str(folder / "two"))
    return options.Data(mix=sources, frames=2, questions=3, buckets=3)


def streams(encoder, data, **more):
    data = data.model_copy(update=more)
    frames = pipeline.read(data)
    return [
        pipeline.training(frames, encoder, data, options.Targets(reasoning=0.5, box_slack=0.4), seed=1),
        pipeline.rollouts(frames, encoder, data, seed=1),
    ]


def test_a_mixture_goes_on_from_every_position_of_two_and_a_half_epochs(encoder, mixed):
    for stream, stride in zip(streams(encoder, mixed), (1, 7), strict=True):
        steps = int(2.5 * stream.plan.rows / 2)
        assert steps > 35 and len(stream.shapes) > 1
        whole = take(stream, steps + 2)
        for taken in range(0, steps + 1, stride):
            assert_same(take(stream, 2, taken), whole[taken : taken + 2])


def test_worker_processes_change_nothing_from_the_middle_of_the_stream_on(encoder, mixed):
    alone, _ = streams(encoder, mixed)
    helped, _ = streams(encoder, mixed, workers=2)
    assert_same(take(helped, 5, 33), [alone[33 + i] for i in range(5)])


def test_a_mixture_draws_by_weight_and_each_source_has_its_epochs(encoder, mixed):
    frames = pipeline.read(mixed)
    assert [frame.source for frame in frames] == [0] * 14 + [1] * 7
    stream = pipeline.rollouts(frames, encoder, mixed, seed=1)
    number, rows = 200, plan_rows(frames, 3, 1)
    seen = Counter(rows_asked(stream[i] for i in range(number)))
    shares = [sum(n for row, n in seen.items() if frames[row.frame].source == source) for source in (0, 1)]
    assert shares[0] / sum(shares) == pytest.approx(2 / 3, abs=0.01)
    for source in (0, 1):
        counts = [seen[row] for row in rows if frames[row.frame].source == source]
        assert min(counts) > 0 and max(counts) - min(counts) <= 2


def test_sources_with_other_answers_or_without_frames_are_refused(encoder, mixed, tmp_path):
    synth.write(tmp_path / "own", frames=2, seed=0, size=(84, 56), max_tools=1, sequences=("seq_2",))
    (tmp_path / "own" / "data.json").write_text(json.dumps({"classes": [*vocabulary.CLASSES, "other"]}))
    other = mixed.model_copy(update=dict(mix=(*mixed.mix, options.Source(root=str(tmp_path / "own")))))
    with pytest.raises(InputError, match=r"own: its answers are not those of .*one \(19, 18\)"):
        pipeline.read(other)
    synth.write(tmp_path / "val", frames=2, seed=0, size=(84, 56), max_tools=1, sequences=("seq_1",))
    empty = mixed.model_copy(update=dict(mix=(*mixed.mix, options.Source(root=str(tmp_path / "val")))))
    with pytest.raises(InputError, match=r"val: no frames in split train; take it out of data\.mix"):
        pipeline.rollouts(pipeline.read(empty), encoder, empty, seed=0)


def test_epochs_are_worked_out_as_steps(frames):
    rows = len(plan_rows(frames, 3))
    for epochs in (0.01, 1, 2.5):
        found = pipeline.steps(frames, config(), options.Schedule(epochs=epochs))
        assert (found.steps, found.epochs) == (max(1, round(epochs * rows / 4)), None)
    assert pipeline.steps(frames, config(), options.Schedule(steps=7)).steps == 7
    assert options.Schedule().steps == 1000
    with pytest.raises(ValueError, match=r"steps 7 and epochs 2\.5 are both given; take one out"):
        options.Schedule(steps=7, epochs=2.5)


def test_the_fingerprint_tells_any_change_of_the_configuration(encoder, mixed):
    frames = pipeline.read(mixed)

    def of(seed=1, targets=options.Targets(), **more):  # noqa: B008
        stream = pipeline.training(frames, encoder, mixed.model_copy(update=more), targets, seed=seed)
        return pipeline.fingerprint(frames, seed, stream.plan, targets)

    heavier = (mixed.mix[0].model_copy(update=dict(weight=3.0)), mixed.mix[1])
    changed = [
        of(),
        of(seed=2),
        of(targets=options.Targets(reasoning=0.5)),
        of(frames=1),
        of(questions=2),
        of(buckets=1),
        of(mix=heavier),
    ]
    assert len(set(changed)) == len(changed)
    assert of(workers=2, threads=5, cache=0.0) == changed[0], "how batches are made is not what they are"


def test_a_frame_is_changed_by_its_place_in_the_stream_alone_and_only_where_it_still_fits(encoder, frames, monkeypatch):
    def shifted(frame, picture, rng):
        shift = int(rng.integers(1, 20))
        seen.setdefault(frame.id, set()).add(shift)
        if frame.id == frames[0].id:  # grows too long
            return dataclasses.replace(
                frame, records=(dataclasses.replace(frame.records[0], think="so " * 99),) * 9
            ), picture
        return frame, Image.fromarray(np.roll(np.asarray(picture), shift, 1))

    seen = {}

    def make(change):
        monkeypatch.setattr(pipeline, "changing", lambda *_: change)
        return pipeline.training(frames, encoder, config(), options.Targets(), seed=1)

    plain, moved = make(None), make(shifted)
    one, again, bare = take(moved, 9), take(make(shifted), 4, taken=5), take(plain, 9)
    assert_same(again, one[5:])
    assert all(len(shifts) > 1 for shifts in seen.values()), "another shift at another place"
    same = [
        np.array_equal(a.patches_BWSC[b], c.patches_BWSC[b]) for a, c in zip(one, bare, strict=True) for b in range(4)
    ]
    assert 0 < sum(same) < len(same) / 3
    assert moved.shapes[0].lane_tokens > plain.shapes[0].lane_tokens


@pytest.mark.parametrize("program", ["training", "rollouts"])
def test_mirrored_frames_are_taught_and_judged_by_mirrored_labels(encoder, frames, program):
    def first(**augment):
        data = config(augment=options.Augment(**augment), frames=len(frames), questions=9)
        made = getattr(pipeline, program)
        more = (options.Targets(),) if program == "training" else ()
        return take(made(frames, encoder, data, *more, seed=1), 1)[0]

    plain, mirrored = first(), first(flip_left_right=1.0)
    if program == "training":
        said = [
            [encoder.chat.tokenizer.decode(ids) for ids in batch.branch_ids_BJT.reshape(-1, 8)]
            for batch in (plain, mirrored)
        ]
        assert said[0] != said[1]
        return
    (shown, gold), (other, judged) = plain, mirrored
    assert np.array_equal(gold.frame_B, judged.frame_B) and np.array_equal(gold.record_BQ, judged.record_BQ)
    moved = (gold.box_BQ4 != judged.box_BQ4).any(-1) & gold.valid_BQ
    assert moved.any() and not np.array_equal(shown.patches_BWSC, other.patches_BWSC)
    x0, y0, x1, y1 = np.moveaxis(gold.box_BQ4[moved], -1, 0)
    np.testing.assert_allclose(judged.box_BQ4[moved], np.stack([1 - x1, y0, 1 - x0, y1], -1), atol=1e-3)
    names = np.array(vocabulary.CLASSES)
    swap = {
        "left-top": "right-top",
        "right-top": "left-top",
        "left-bottom": "right-bottom",
        "right-bottom": "left-bottom",
    }
    asked = moved & (gold.kind_BQ == vocabulary.LOCATION)
    assert asked.any()
    assert [swap[name] for name in names[gold.answer_BQ[asked]]] == list(names[judged.answer_BQ[asked]])
    rest = moved & (gold.kind_BQ != vocabulary.LOCATION) & (gold.kind_BQ != vocabulary.TOOL)
    assert np.array_equal(gold.answer_BQ[rest], judged.answer_BQ[rest])


def test_what_tensorflow_datasets_prepared_gives_the_batches_of_its_source(encoder, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    import surgery_r1_jax.surgery_vqla  # noqa: F401 - makes the name known

    root = toy.write_data(tmp_path / "manual" / "EndoVis-18-VQLA", frames=6)
    builder = tfds.builder("surgery_vqla/endovis18", data_dir=tmp_path / "prepared")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "manual"))
    both = []
    for place in (root, tmp_path / "prepared", builder.data_dir):
        data = config(root=str(place), frames=2)
        found = pipeline.read(data)
        both.append(take(pipeline.training(found, encoder, data, options.Targets(), seed=1), 4))
    assert_same(both[1], both[0])
    assert_same(both[2], both[0])
    assert [frame.id for frame in found] == [frame.id for frame in pipeline.read(config(root=str(root)))]
    assert pipeline.fingerprint(found) != pipeline.fingerprint(found[1:])
    shard = next(Path(builder.data_dir).glob("*train*array_record*"))
    shard.rename(shard.with_name("gone"))
    prepared._shards.cache_clear()
    with pytest.raises(InputError, match="0 of the shards of split train are here; prepare it anew"):
        pipeline.read(data)
    (tmp_path / "prepared" / "other").mkdir()
    for name in ("surgery_vqla/custom/1.0.0", "surgery_vqla/endovis18/2.0.0"):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        (tmp_path / "prepared" / name / "dataset_info.json").write_text('{"name": "other"}')
    with pytest.raises(InputError, match=r"holds 3 prepared data sets; give one of surgery_vqla/custom/1\.0\.0, "):
        pipeline.read(config(root=str(tmp_path / "prepared")))
    with pytest.raises(InputError, match=r"metadata\.json: cannot be read"):
        pipeline.read(config(root=str(tmp_path / "prepared" / "surgery_vqla" / "custom")))


# What is read


def test_a_limit_spreads_over_the_split(frames):
    root = frames[0].image.parents[2]
    limited = pipeline.read(options.Data(root=str(root), split="all", limit=3))
    assert [frame.id for frame in limited] == [frames[0].id, frames[4].id, frames[8].id]
    assert pipeline.read(options.Data(root=str(root), split="all", limit=99)) == frames


# What is taught


def taught(encoder, frames, targets, seed=0):
    """(frame number, record, wanted, parsed answer) of every branch."""
    for number, frame in enumerate(frames):
        for index, record in enumerate(frame.records):
            branch = pipeline._branch(frame, encoder, targets, seed, number, index)
            (want,) = (w for w in range(3) if encoder.prompt(record, w) == branch.prompt)
            yield number, record, want, answer.parse(encoder.chat.decode(branch.completion), want=want)


@pytest.mark.parametrize(
    ("targets", "thinking", "wanted"),
    [
        (options.Targets(), 1, (0, 0, 1)),
        (options.Targets(reasoning=0), 0, (0, 0, 1)),
        (options.Targets(reasoning=0.5, answer_only=0.2, box_only=0.3), 0.5, (0.2, 0.3, 0.5)),
        (options.Targets(answer_only=0.75, box_only=0.25), 1, (0.75, 0.25, 0)),
    ],
)
def test_shares_of_reasoning_and_of_what_is_wanted(encoder, frames, targets, thinking, wanted):
    rows = [row for seed in range(12) for row in taught(encoder, frames, targets, seed)]
    assert len(rows) > 400 and all(parsed.format_ok for *_, parsed in rows)
    assert np.mean([bool(parsed.think) for *_, parsed in rows]) == pytest.approx(thinking, abs=0.07)
    for want in range(3):
        assert np.mean([w == want for _, _, w, _ in rows]) == pytest.approx(wanted[want], abs=0.07)


def test_more_than_the_whole_is_refused():
    with pytest.raises(ValueError, match=r"answer_only 0\.6 and box_only 0\.5 are more than 1 together"):
        options.Targets(answer_only=0.6, box_only=0.5)


def test_reasoning_of_the_data_replaces_ours(encoder, frames):
    own = dataclasses.replace(frames[0].records[0], think="A teacher wrote this.")
    frame = dataclasses.replace(frames[0], records=(own, *frames[0].records[1:]))
    thoughts = [parsed.think for *_, parsed in taught(encoder, [frame], options.Targets())]
    assert thoughts == ["A teacher wrote this.", *(reasoning.write(frame, r) for r in frame.records[1:])]


fractions = st.floats(0, 1)


@settings(deadline=None, max_examples=300)
@given(fractions, fractions, fractions, fractions, fractions, st.integers(0, 99))
def test_a_coarse_box_holds_the_true_one_inside_the_frame(a, b, c, d, slack, seed):
    box = (min(a, b), min(c, d), max(a, b), max(c, d))
    x0, y0, x1, y1 = pipeline.coarse(box, slack, np.random.default_rng(seed))
    assert 0 <= x0 <= box[0] and 0 <= y0 <= box[1] and box[2] <= x1 <= 1 and box[3] <= y1 <= 1
    most = 1 + 1e-9
    assert box[0] - x0 <= slack * (box[2] - box[0]) * most and y1 - box[3] <= slack * (box[3] - box[1]) * most


def test_all_questions_about_an_instrument_are_taught_one_coarse_box(encoder, frames):
    """Tool questions of the extended sets name the instrument in their answer."""
    frame = max(frames, key=lambda f: len(f.records))
    tool, box = next((r.tool, r.box) for r in frame.records if r.tool)
    which = records.Record(vocabulary.ask(vocabulary.TOOL, "left-top"), tool, box, vocabulary.TOOL, None, "f:1")
    frame = dataclasses.replace(frame, records=(*frame.records, which))
    seen = {}
    for seed in range(3):
        targets = options.Targets(reasoning=0, box_slack=0.5)
        for index, record in enumerate(frame.records):
            branch = pipeline._branch(frame, encoder, targets, seed, 0, index)
            found = answer.parse(encoder.chat.decode(branch.completion), classes=vocabulary.EXTENDED_CLASSES)
            seen.setdefault((seed, pipeline._instrument(record)), set()).add(found.box)
    assert len(seen) >= 6 and all(len(boxes) == 1 for boxes in seen.values())
    assert len(set(map(tuple, seen.values()))) > 3, "another seed, another box"


def test_without_slack_the_boxes_are_exact(encoder, frames):
    for number, record, _, parsed in taught(encoder, frames, options.Targets()):
        size = encoder.preprocessor.resized(frames[number].width, frames[number].height)
        assert parsed.box == tuple(map(float, encoder.codec.encode(record.box, *size)))


# Records that say themselves what they want


def own(frames):
    """Two frames whose records want an answer, a box reasoned first, both, or do not say."""
    own = dict(tool=None, kind=vocabulary.OTHER)
    forms = [dict(want=0, think=""), dict(want=1, think="It gapes."), dict(want=2, think=""), dict(think=None)]
    return [
        dataclasses.replace(
            frame,
            classes=("open", "shut"),
            records=tuple(
                dataclasses.replace(frame.records[0], question=f"Question {i}?", answer="shut", **own, **form)
                for i, form in enumerate(forms)
            ),
        )
        for frame in frames[:2]
    ]


def test_a_record_that_says_what_it_wants_is_taught_as_it_stands(encoder, frames):
    frame = own(frames)[0]
    for targets in (options.Targets(), options.Targets(reasoning=0, box_only=1)):
        branches = [pipeline._branch(frame, encoder, targets, 0, 0, index) for index in range(4)]
        texts = [encoder.chat.decode(branch.completion) for branch in branches]
        assert ["bbox_2d" in text for text in texts] == [False, True, True, True]
        assert ['"answer"' in text for text in texts] == [True, False, True, not targets.box_only]
        assert ["<think>It gapes.</think>" in text for text in texts] == [False, True, False, False]
        assert not any("<think>" in texts[i] for i in (0, 2, 3))  # of what the labels do not tell nothing is made up


def test_rollouts_ask_for_what_is_wanted_and_an_evaluation_for_all(encoder, frames):
    own_frames, own_encoder = own(frames), dataclasses.replace(encoder, classes=("open", "shut"))
    settings = config(frames=1, questions=4)
    stream = pipeline.rollouts(own_frames, own_encoder, settings, seed=0)
    for prompts, gold in take(stream, 2):
        wanted = {own_frames[n].records[i].want for n, i in asked(gold)}
        assert wanted == {0, 1, 2, None} and sorted(gold.want_BQ[0]) == [0, 1, 2, 2]
        assert set(gold.answer_BQ[0]) == {1}  # its place among its own classes
        told = [
            encoder.chat.decode(ids[n:])
            for ids, n in zip(prompts.branch_ids_BJT[0], (prompts.branch_segment_BJT[0] == 0).sum(1), strict=True)
        ]
        assert [" Give only the answer." in text for text in told] == [want == 0 for want in gold.want_BQ[0]]
    batches, _ = pipeline.once(own_frames, own_encoder, settings)
    assert {int(want) for _, gold in batches for want in gold.want_BQ[gold.valid_BQ]} == {2}


# Fingerprint


def test_the_fingerprint_tells_any_change_of_labels_images_order_and_plan(tmp_path):
    root = tmp_path / "data"
    synth.write(root, frames=3, seed=0, size=(84, 56), sequences=("seq_2",))
    label = sorted(root.glob("seq_2/vqla/label/*.txt"))[1]
    image = sorted(root.glob("seq_2/left_frames/*"))[2]
    first = pipeline.fingerprint(records.read(root))
    assert first == pipeline.fingerprint(records.read(root)) and len(first) == 64
    prints = {first, pipeline.fingerprint(records.read(root)[::-1]), pipeline.fingerprint(records.read(root)[:2])}
    prints |= {pipeline.fingerprint(records.read(root), *plan) for plan in ((0,), (1,), (0, config()), (0, 4))}

    text = label.read_bytes()
    at = next(i for i in range(len(text) - 1, 0, -1) if text[i : i + 1].isdigit())
    label.write_bytes(text[:at] + (b"1" if text[at : at + 1] != b"1" else b"2") + text[at + 1 :])
    prints.add(pipeline.fingerprint(records.read(root)))
    label.write_bytes(text)

    data = image.read_bytes()
    image.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    prints.add(pipeline.fingerprint(records.read(root)))
    image.write_bytes(data)

    frame, *rest = records.read(root)
    for change in (
        dict(answer="Idle" if frame.records[0].answer != "Idle" else "Cutting"),
        dict(question="What?"),
        dict(think="Because."),
        dict(box=(0.0, 0.0, 0.5, np.nextafter(0.5, 1))),
        dict(box=(0.0, 0.0, 0.5, 0.5)),
    ):
        record = dataclasses.replace(frame.records[0], **change)
        changed = dataclasses.replace(frame, records=(record, *frame.records[1:]))
        prints.add(pipeline.fingerprint([changed, *rest]))
    assert len(prints) == 1 + 2 + 4 + 1 + 1 + 5
    assert pipeline.fingerprint(records.read(root)) == first


def test_no_place_on_disk_is_in_the_fingerprint(tmp_path):
    for name in ("here", "there"):
        synth.write(tmp_path / name, frames=2, seed=0, size=(84, 56), sequences=("seq_2",))
    assert pipeline.fingerprint(records.read(tmp_path / "here")) == pipeline.fingerprint(
        records.read(tmp_path / "there")
    )


def test_an_epoch_is_planned_without_opening_an_image(encoder, frames, monkeypatch):
    monkeypatch.setattr(examples.images, "load", lambda path: pytest.fail(f"opened {path}"))
    pipeline.training(frames, encoder, config(), options.Targets(), seed=0)
    pipeline.rollouts(frames, encoder, config(), seed=0)
