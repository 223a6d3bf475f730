import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import SHARED

from surgery_r1_jax import answer, build, cli, labellist, records, synth, tracecheck
from surgery_r1_jax.errors import InputError

LABELS = SHARED / "data" / "endovis18" / "labels_train.txt"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    synth.write(root, frames=4, seed=1, size=(112, 84), max_tools=3, sequences=("seq_1", "seq_2"))
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_every_question_becomes_six_records(source, tmp_path, capsys):
    stats = build.run(source, tmp_path / "out")
    frames = {frame.id: frame for frame in records.read(source)}
    questions = sum(len(frame.records) for frame in frames.values())
    rows = lines(tmp_path / "out" / "records.jsonl")
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(build.FORMS, questions) == stats["kinds"]
    assert len({row["id"] for row in rows}) == len(rows) == stats["records"] == 6 * questions
    assert stats == json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["reasoning"] == {"written": 3 * questions}
    assert f"{6 * questions:,} records" in capsys.readouterr().out
    for row in rows:
        name, index, _ = row["id"].rsplit("/", 2)
        frame, record = frames[name], frames[name].records[int(index)]
        assert (row["question"], row["answer"]) == (record.question, record.answer)
        assert row["bbox"] == pytest.approx([edge * side for edge, side in zip(record.box, (112, 84) * 2, strict=True)])
        assert all(isinstance(edge, int) for edge in row["bbox"])
        assert row["split"] == {"seq_1": "val", "seq_2": "train"}[row["sequence"]]
        assert (tmp_path / "out" / row["image"]).read_bytes() == frame.image.read_bytes()
        want = answer.WANT.index(row["want"])
        assert row["kind"].startswith(("vqa_", "grounding_", "vqla_")[want])
        assert ("reasoning" in row) == row["kind"].endswith("_cot")
        if "reasoning" in row:
            assert tracecheck.check(row["reasoning"], frame, record, want=want) == "ok"
    about = json.loads((tmp_path / "out" / "data.json").read_text())
    assert about["boxes"] == "pixel" and len(about["classes"]) == 18
    assert about["location"] == {"reference": "organ", "top": "larger_y"}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_reasoning(source, tmp_path):
    for name, seed in (("a/x", 0), ("b/x", 0), ("c/x", 1)):
        build.run(source, tmp_path / name, seed=seed, dialogues=True)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert first["x/records.jsonl"] != other["x/records.jsonl"]


def test_kinds_are_chosen_and_weighted(source, tmp_path):
    stats = build.run(source, tmp_path / "out", kinds={"vqla_cot": 2, "vqa_direct": 0.5})
    questions = stats["questions"]
    assert list(stats["kinds"]) == ["vqa_direct", "vqla_cot"]
    assert stats["kinds"]["vqla_cot"] == 2 * questions
    assert 0.2 * questions < stats["kinds"]["vqa_direct"] < 0.8 * questions
    rows = [row for row in lines(tmp_path / "out" / "records.jsonl") if row["kind"] == "vqla_cot"]
    assert len({row["reasoning"] for row in rows}) > 0.9 * len(rows)


def test_a_split_is_taken_alone(source, tmp_path):
    build.run(source, tmp_path / "out", split="train")
    rows = lines(tmp_path / "out" / "records.jsonl")
    assert {row["sequence"] for row in rows} == {"seq_2"}
    assert sorted(path.name for path in (tmp_path / "out" / "frames").iterdir()) == ["seq_2"]


def test_nothing_points_out_of_the_folder(source, tmp_path):
    inside = tmp_path / "source"
    synth.write(inside, frames=1, seed=1, size=(112, 84), sequences=("seq_2",))
    image = inside / "seq_2" / "left_frames" / "frame000.png"
    image.rename(inside / "frame.png")
    image.symlink_to(inside / "frame.png")  # within the data set, so the reader takes it
    build.run(inside, tmp_path / "out")
    copy = tmp_path / "out" / "frames" / "seq_2" / "frame000.png"
    assert not copy.is_symlink() and copy.read_bytes() == image.read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_frames_are_copied_where_they_cannot_be_linked(source, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    build.run(source, tmp_path / "out")
    assert len(list((tmp_path / "out" / "frames").rglob("*.png"))) == 4


def test_a_list_of_labels_is_enough(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("seq_2/frame000|What organ is being operated?|kidney|7,9,1186,438\n")
    build.run(path, tmp_path / "out", size=(1300, 1100))
    about = json.loads((tmp_path / "out" / "data.json").read_text())
    assert (about["images"], about["size"]) == (False, [1300, 1100])
    rows = lines(tmp_path / "out" / "records.jsonl")
    assert {row["image"] for row in rows} == {"frames/seq_2/frame000.png"}
    assert rows[0]["bbox"] == [6, 8, 1185, 437]
    assert not (tmp_path / "out" / "frames").exists()


def test_a_conversation_asks_every_question_of_its_frame_once(source, tmp_path):
    build.run(source, tmp_path / "out", dialogues=True)
    talks = lines(tmp_path / "out" / "dialogues.jsonl")
    frames = records.read(source)
    assert [talk["id"] for talk in talks] == [frame.id for frame in frames]
    ids = {row["id"]: row for row in lines(tmp_path / "out" / "records.jsonl")}
    for talk, frame in zip(talks, frames, strict=True):
        assert sorted(turn["question"] for turn in talk["turns"]) == sorted(r.question for r in frame.records)
        assert all(turn.items() <= ids[turn["id"]].items() for turn in talk["turns"])


def test_reasoning_of_the_data_set_is_kept_where_the_labels_bear_it_out(tmp_path, monkeypatch):
    path = tmp_path / "labels.txt"
    path.write_text("seq_2/frame000|What is the state of stapler?|Idle|7,9,1186,438\n")
    (frame,) = labellist.read(path)
    for think, origin in (("The stapler rests, Idle.", "data set"), ("The stapler is Cutting.", "written")):
        record = build.dataclasses.replace(frame.records[0], think=think)
        told = build.dataclasses.replace(frame, records=(record,))
        monkeypatch.setattr(build, "read", lambda *_, told=told: ([told], False))
        stats = build.run(path, tmp_path / origin, kinds={"vqa_cot": 1})
        assert stats["reasoning"] == {origin: 1}
        (row,) = lines(tmp_path / origin / "records.jsonl")
        assert (row["reasoning"] == think) == (origin == "data set")
    assert stats["refused"] == {"data set: a state that the labels do not give": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"vqa": 1}}, "unknown kind 'vqa'; there are vqa_direct, "),
        ({"kinds": {"vqa_cot": 101}}, "kind vqa_cot has weight 101; take 0 to 100"),
        ({"kinds": {"vqa_cot": 0}}, "no record is left"),
        ({"split": "dev"}, "split dev is empty"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(source, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build.run(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not an empty folder"):
        build.run(source, tmp_path / "out")
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("mine")
    build.run(source, tmp_path / "new")
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "new.part" / "mine").read_text() == "mine"
    (tmp_path / ".last.part").symlink_to(tmp_path / "out")
    with pytest.raises(InputError, match=r"\.last\.part: is in the way; remove it"):
        build.run(source, tmp_path / "last")
    assert (tmp_path / "out" / "mine").read_text() == "mine" and not (tmp_path / "last").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_run_that_stops_leaves_nothing(source, tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(build, "_link", stop)
    with pytest.raises((KeyboardInterrupt, InputError, RuntimeError)):
        build.run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_one_works(source, tmp_path):
    code = f"""
import os, signal
from surgery_r1_jax import build
build._link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build.run({str(source)!r}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    build.run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_makes_it_and_refuses_in_one_line(source, tmp_path, capsys):
    words = ["data", "build", str(source), str(tmp_path / "out"), "--kinds", "vqa_direct,grounding_cot"]
    assert cli.main(words) == 0
    assert {row["kind"] for row in lines(tmp_path / "out" / "records.jsonl")} == {"vqa_direct", "grounding_cot"}
    capsys.readouterr()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {tmp_path / 'out'}: already exists and is not an empty folder; give a new one\n")


def test_a_part_of_the_real_labels_becomes_six_times_as_many_records(tmp_path):
    if not LABELS.is_file():
        pytest.skip(f"{LABELS} is not on this machine")
    some = tmp_path / "some.txt"
    some.write_text("".join(LABELS.read_text().splitlines(keepends=True)[:300]))
    since = time.monotonic()
    stats = build.run(some, tmp_path / "out")
    assert (stats["records"], stats["refused"]) == (1800, {})
    assert time.monotonic() - since < 60


def test_what_is_built_is_read_as_it_was_meant_and_not_built_upon(source, tmp_path):
    build.run(source, tmp_path / "out")
    before = {frame.id: frame for frame in records.read(source)}
    after = records.read(tmp_path / "out")
    rows = lines(tmp_path / "out" / "records.jsonl")
    assert [(r.question, r.answer, r.want, r.think) for frame in after for r in frame.records] == [
        (row["question"], row["answer"], answer.WANT.index(row["want"]), row.get("reasoning", "")) for row in rows
    ]
    for frame in after:
        original = before[frame.id.removeprefix("frames/").removesuffix(".png")]
        assert records.split_of_frame(frame) == records.split_of_frame(original)
        assert {r.box for r in frame.records} == {r.box for r in original.records}
        assert frame.image.read_bytes() == original.image.read_bytes()
    with pytest.raises(InputError, match="its records are told what to ask for already; build from their source"):
        build.run(tmp_path / "out", tmp_path / "again")
