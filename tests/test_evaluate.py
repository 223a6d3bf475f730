"""evaluate.py: every question is answered and counted once, and the file of answers says all that the figures say."""

import dataclasses
import hashlib
import json
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from surgery_r1_jax import (
    answer,
    checkpoint,
    codec,
    evaluate,
    floors,
    hf,
    metrics,
    options,
    records,
    sampling,
    sharding,
    synth,
    vocabulary,
)
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.stream import Shard

KEYS = ["frame", "question", "answer", "box", "pred_answer", "pred_box", "iou", "text", "reason"]
TOKENS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Frames of the train, dev and val splits, one to three instruments each."""
    root = tmp_path_factory.mktemp("data") / "frames"
    synth.write(root, frames=15, seed=5, size=(84, 56), max_tools=3, sequences=("seq_1", "seq_2", "seq_6"))
    return root


@pytest.fixture(scope="module")
def frames(data):
    return records.read(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_model(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def loaded(folder):
    return checkpoint.load_model(folder)


@pytest.fixture(scope="module")
def runner(loaded):
    return evaluate.runner_of(loaded.folder, loaded.config, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))


def config(**more):
    return options.Data(root="data", **{"frames": 4, "questions": 9, **more})


@pytest.fixture
def scripted(runner, monkeypatch):
    """In place of a model: every lane's text follows from its question and its frame's pixels alone.

    Returns the list of batches that were decoded.
    """
    chat, seen = runner.encoder.chat, []

    def text(patches, ids):
        random = np.random.default_rng(list(hashlib.sha256(patches.tobytes() + ids.tobytes()).digest()))
        x0, y0 = random.integers(0, 40, 2).tolist()
        box = [x0, y0, x0 + int(random.integers(1, 60)), y0 + int(random.integers(1, 40))]
        said = answer.render(answer=str(random.choice(vocabulary.CLASSES)), box=box)
        spoilt = (said, said, said, said.replace("answer>", "Answer>"), said.replace(str(box[2]), "-1"), "", "kidney")
        return str(random.choice(spoilt)), random.random() < 0.9

    def decode(graph, params, prompts, words, settings):
        seen.append(prompts)
        B, J, _ = prompts.branch_ids_BJT.shape
        tokens, stopped = np.full((B, J, 60), words.pad_id, np.int32), np.zeros((B, J), bool)
        for b, j in zip(*np.nonzero(np.any(prompts.branch_segment_BJT, -1)), strict=True):
            asked = np.asarray(prompts.branch_ids_BJT)[b, j][np.asarray(prompts.branch_segment_BJT)[b, j] > 0]
            said, stopped[b, j] = text(np.asarray(prompts.patches_BWSC)[b], asked)
            ids = chat.completion_ids(said)
            tokens[b, j, : len(ids)] = ids
        return sampling.Rollout(jax.numpy.asarray(tokens), None, None, jax.numpy.asarray(stopped))

    monkeypatch.setattr(evaluate, "decode", decode)
    return seen


def exact_iou(a, b):
    """Intersection over union of two boxes by rational arithmetic."""
    a, b = ([Fraction(edge) for edge in box] for box in (a, b))
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return float(inter / (areas - inter))


# What is answered


@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
def test_every_question_is_answered_once_in_order(runner, scripted, frames, count):
    told = []
    rows = evaluate.predict(runner, None, frames[:count], config(), TOKENS, lambda *at: told.append(at))
    asked = [(f.id, r.question, r.answer, list(r.box)) for f in frames[:count] for r in f.records]
    assert [(r["frame"], r["question"], r["answer"], r["box"]) for r in rows] == asked
    assert all(list(row) == KEYS for row in rows)
    batches = -(-count // 4)
    assert told == [(done, batches) for done in range(batches + 1)] and len(scripted) == batches


def test_what_a_row_says_follows_from_its_text(runner, scripted, frames):
    rows = evaluate.predict(runner, None, frames, config(), TOKENS)
    reasons = {row["reason"] for row in rows}
    assert reasons >= {"OK", "TRUNCATED", "NO_ANSWER_TAG", "BAD_BOX"} and None in [row["pred_box"] for row in rows]
    for row in rows:
        parsed = answer.parse(row["text"], truncated=row["reason"] == "TRUNCATED")
        assert row["reason"] == parsed.reason.name
        assert row["pred_answer"] == (None if parsed.answer < 0 else vocabulary.CLASSES[parsed.answer])
        if parsed.box is None:
            assert row["pred_box"] is None and row["iou"] == 0
        else:
            size = runner.encoder.preprocessor.resized(84, 56)
            assert row["pred_box"] == list(codec.RESIZED_PIXELS.decode(parsed.box, *size)), "nothing is rounded"
            assert row["iou"] == pytest.approx(exact_iou(row["pred_box"], row["box"]), abs=1e-15)


@pytest.mark.parametrize(("batch", "questions"), [(1, 9), (3, 2), (15, 9), (16, 4)])
def test_batches_change_no_answer(runner, scripted, frames, batch, questions):
    want = evaluate.predict(runner, None, frames, config(), TOKENS)
    assert evaluate.predict(runner, None, frames, config(frames=batch, questions=questions), TOKENS) == want


def test_a_batch_is_rounded_up_to_what_the_mesh_divides(runner, scripted, frames):
    wide = runner._replace(mesh=sharding.make_mesh((2, 4, 1)))
    want = evaluate.predict(runner, None, frames, config(), TOKENS)
    scripted.clear()
    assert evaluate.predict(wide, None, frames, config(frames=3), TOKENS) == want
    assert {len(prompts.prefix_ids_BP) for prompts in scripted} == {8}


@pytest.mark.parametrize("count", [1, 6, 15])
def test_processes_answer_a_part_each_and_know_the_whole(runner, scripted, frames, monkeypatch, count):
    want = evaluate.predict(runner, None, frames[:count], config(), TOKENS)
    parts = []
    for index in range(2):
        monkeypatch.setattr(evaluate, "_gather", lambda found: parts.append(found) or found)
        half = runner._replace(shard=Shard(index, 2))
        evaluate.predict(half, None, frames[:count], config(), TOKENS)
    assert not parts[0].keys() & parts[1].keys()
    monkeypatch.undo()

    texts = [json.dumps([[key, given] for key, given in part.items()]).encode() for part in parts]

    def allgather(value):  # as process 0 meets it
        other = np.int32(len(texts[1])) if not value.ndim else np.frombuffer(texts[1].ljust(len(value)), np.uint8)
        return np.stack([value, other])

    monkeypatch.setattr(evaluate.multihost_utils, "process_allgather", allgather)
    found = evaluate._gather(parts[0])
    rows = evaluate._rows((frames[n], frames[n].records[i], found[n, i]) for n, i in sorted(found))
    assert rows == want


def test_a_grey_image_is_asked_each_question_once_for_all_frames(runner, scripted, frames):
    mixed = [dataclasses.replace(f, width=56, height=84) if i % 3 == 0 else f for i, f in enumerate(frames)]
    unseeing = runner._replace(encoder=dataclasses.replace(runner.encoder, blank=True))
    want = evaluate.predict(unseeing, None, mixed, config(), TOKENS)
    decoded = len(scripted)
    scripted.clear()
    gone = [dataclasses.replace(frame, image=Path("nowhere.png")) for frame in mixed]
    assert evaluate.predict_blank(runner, None, gone, config(), TOKENS) == want
    asked = sum(np.any(prompts.branch_segment_BJT, -1).sum() for prompts in scripted)
    assert asked == len({(f.width, r.question) for f in mixed for r in f.records}) < len(want)
    assert len(scripted) <= decoded
    assert evaluate.predict(runner, None, frames, config(), TOKENS) != want


# What it is worth


def test_the_file_gives_the_bits_of_the_live_run(runner, scripted, frames, tmp_path):
    rows = evaluate.predict(runner, None, frames, config(), TOKENS)
    evaluate.write_predictions(tmp_path / "p.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    live, stored = metrics.of_rows(rows), metrics.from_predictions(tmp_path / "p.jsonl")
    for a, b in zip(live, stored, strict=True):
        np.testing.assert_array_equal(a, b)
    scores = evaluate.score(rows)
    assert metrics.table(stored) == {k: v for k, v in scores.items() if k != "accuracy_location_multi_tool"}
    assert metrics.intervals(stored, draws=20) == metrics.intervals(live, draws=20)
    assert scores["n"] == len(rows) and 0 < scores["parse_failure_rate"] < 1
    assert scores["miou"] == pytest.approx(np.mean([row["iou"] for row in rows]), abs=1e-15)


def test_the_order_of_the_rows_changes_no_bit(runner, scripted, frames):
    rows = evaluate.predict(runner, None, frames, config(), TOKENS)
    order = np.random.default_rng(0).permutation(len(rows))
    assert evaluate.score([rows[i] for i in order]) == evaluate.score(rows)


def row(frame, question, right, *, kind_answer=None):
    gold = kind_answer or ("left-top" if "located" in question else "Idle")
    wrong = "right-top" if gold == "left-top" else "Cutting"
    box = [0.1, 0.1, 0.4, 0.4]
    return dict(
        frame=frame, question=question, answer=gold, box=box, pred_answer=gold if right else wrong, pred_box=box
    )


def where(tool):
    return vocabulary.ask(vocabulary.LOCATION, tool)


def test_location_accuracy_is_also_told_for_frames_with_several_instruments():
    a, b = vocabulary.TOOLS[:2]
    rows = [
        row("one", where(a), True),
        row("one", vocabulary.ask(vocabulary.ORGAN), True, kind_answer="kidney"),
        row("two", where(a), False),
        row("two", where(b), True),
        row("two", vocabulary.ask(vocabulary.STATE, a), False),
        # The second instrument is known from its state alone; its name is spelled otherwise.
        row("three", where(a), True),
        row("three", f"what is the state of {b.replace('_', ' ')}?", True),
    ]
    scores = evaluate.score(rows)
    assert scores["accuracy_location_multi_tool"] == pytest.approx(2 / 3)
    assert scores["by_kind"]["location"]["accuracy"] == pytest.approx(3 / 4)
    assert "accuracy_location_multi_tool" not in evaluate.score(rows[:2]), "no frame has several"
    assert "accuracy_no_organ" in scores
    assert not any("accuracy_no_organ" in part for part in scores["by_kind"].values())


def test_kinds_come_from_questions_and_else_from_answers():
    tool = vocabulary.TOOLS[0]
    questions = [vocabulary.ask(vocabulary.ORGAN), vocabulary.ask(vocabulary.STATE, tool), where(tool)]
    answers = ["kidney", "Idle", "left-top"]
    rows = [row("f", q, True, kind_answer=a) for q, a in zip(questions, answers, strict=True)]
    rows += [row("f", "Say where?", True, kind_answer=a) for a in answers]
    assert metrics.of_rows(rows).kind.tolist() == [0, 1, 2, 0, 1, 2]
    assert {kind: part["n"] for kind, part in evaluate.score(rows)["by_kind"].items()} == {
        "organ": 2,
        "state": 2,
        "location": 2,
    }


def test_the_floor_of_questions_alone_equals_its_own_module(frames):
    train, val = records.split(frames, "train"), records.split(frames, "val")
    found = evaluate.floor_metrics(train, val)
    want = floors.score(val, floors.question_only(train, val))
    assert found["n"] == want["all"].questions == sum(len(f.records) for f in val)
    assert found["accuracy"] == pytest.approx(want["all"].accuracy, abs=1e-12)
    assert found["miou"] == pytest.approx(want["all"].miou, abs=1e-12)
    assert found["parse_failure_rate"] == 0
    for kind, part in found["by_kind"].items():
        assert part["accuracy"] == pytest.approx(want[kind].accuracy, abs=1e-12)


# A model, whole


@pytest.mark.parametrize("name", ["val.json", "v1.val"])
def test_an_evaluation_writes_its_figures_and_its_answers(folder, data, frames, tmp_path, capsys, name):
    out = tmp_path / "new" / name
    before = evaluate.greedily._cache_size()
    status = evaluate.run(folder, data, "val", out, frames=2, max_tokens=TOKENS, blank=name == "val.json")
    assert status == 0
    stem = name.removesuffix(".json")
    assert sorted(f.name for f in out.parent.iterdir()) == [f"{stem}.json", f"{stem}.predictions.jsonl"]
    report = json.loads((out.parent / f"{stem}.json").read_text())
    rows = [json.loads(line) for line in (out.parent / f"{stem}.predictions.jsonl").read_text().splitlines()]
    val = records.split(frames, "val")
    assert report["n"] == len(rows) == sum(len(frame.records) for frame in val)
    assert all(list(row) == KEYS for row in rows)
    assert report["parse_failure_rate"] == 1, "the toy model is untrained"
    stored = metrics.from_predictions(out.parent / f"{stem}.predictions.jsonl")
    assert {name: report[name] for name in metrics.table(stored)} == metrics.table(stored)
    assert report["intervals"] == {name: list(ends) for name, ends in metrics.intervals(stored).items()}
    assert set(report["floors"]) == {"question_only", *(["blank_image"] if name == "val.json" else [])}
    train = records.split(frames, "train")
    assert report["floors"]["question_only"] == evaluate.floor_metrics(train, val)
    assert report["floors"].get("blank_image", {"n": report["n"]})["n"] == report["n"]
    assert (report["checkpoint"], report["data"], report["split"]) == (str(folder), str(data), "val")
    printed = capsys.readouterr().out
    assert f"val: {report['n']} questions" in printed and "question only" in printed and "miou_legacy" in printed
    assert evaluate.greedily._cache_size() - before <= 2, "one program for the frames, one for the grey image"


def test_several_batches_are_one_program(runner, loaded, frames):
    evaluate.greedily.clear_cache()
    rows = evaluate.predict(runner, loaded.params, frames[:7], config(frames=2), TOKENS)
    assert evaluate.greedily._cache_size() == 1
    assert len(rows) == sum(len(frame.records) for frame in frames[:7])
    # The next evaluation of a run finds it compiled, other weights or not.
    other = jax.tree.map(lambda p: p * 0.5, loaded.params)
    evaluate.predict(runner, other, frames[:7], config(frames=2), TOKENS)
    assert evaluate.greedily._cache_size() == 1


def test_a_model_gives_the_same_answers_in_any_batch_on_any_mesh(runner, loaded, frames):
    one = evaluate.predict(runner, loaded.params, frames[:7], config(frames=2), TOKENS)
    assert len({row["text"] for row in one}) > 1, "the toy model must say different things"
    mesh = sharding.make_mesh((2, 2, 2))
    placed = checkpoint.load_model(loaded.folder, mesh)
    wide = evaluate.runner_of(placed.folder, placed.config, mesh)
    assert evaluate.predict(wide, placed.params, frames[:7], config(frames=8), TOKENS) == one


def test_an_evaluation_that_cannot_be_written_is_refused_before_the_work(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("worked for nothing"))
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(InputError, match=r"taken\.json: is a folder"):
        evaluate.run(folder, data, "val", tmp_path / "taken.json")


def test_a_failed_evaluation_leaves_no_files(folder, data, tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "predict", fails)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(folder, data, "val", tmp_path / "val.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_split_is_refused(folder, tmp_path):
    toy.write_data(tmp_path / "data", frames=2)
    with pytest.raises(InputError, match="split val is empty"):
        evaluate.run(folder, tmp_path / "data", "val", tmp_path / "val.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: dataclasses.replace(c, image_token_id=5), "image token is 268 in its tokenizer"),
        (lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, patch_size=16)), "patch_size is 14"),
        (
            lambda c: dataclasses.replace(c, vision=dataclasses.replace(c.vision, spatial_merge_size=1)),
            "merge_size is 2",
        ),
    ],
    ids=["token", "patch", "merge"],
)
def test_files_that_do_not_belong_together_are_refused(folder, change, reason):
    with pytest.raises(InputError, match=reason):
        hf.encoder_of(folder, change(hf.read_config(folder)))


def test_scores_are_printed_with_gaps_where_a_column_has_none(capsys):
    evaluate.print_scores({"model": {"accuracy": 0.5, "n": 3, "by_kind": {}}, "a_floor": {"accuracy": None}}, "title")
    printed = capsys.readouterr().out
    assert "title" in printed and "a floor" in printed and "0.500" in printed and "by_kind" not in printed
