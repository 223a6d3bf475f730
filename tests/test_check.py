import dataclasses
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from surgery_r1_jax import check, floors, records, survey, vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.location import LocationRule

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18"
GOOD = """What organ is being operated?|kidney|1,1,61,41
What is the state of suction?|Idle|2,3,40,30
Where is suction located?|left-bottom|2,3,40,30
"""


def write(root, name, text=GOOD, colour=0, size=(60, 40)):
    sequence, frame = name.split("/")
    labels, images = root / sequence / "vqla" / "label", root / sequence / "left_frames"
    labels.mkdir(parents=True, exist_ok=True)
    images.mkdir(exist_ok=True)
    (labels / f"{frame}_QAL.txt").write_text(text)
    Image.new("RGB", size, (colour, 30, 30)).save(images / f"{frame}.png")
    return images / f"{frame}.png"


@pytest.fixture
def tree(tmp_path):
    """Two training frames, a dev and a val frame, all in order."""
    for colour, name in enumerate(("seq_2/frame000", "seq_10/frame000", "seq_6/frame000", "seq_1/frame000")):
        write(tmp_path, name, colour=colour)
    return tmp_path


def printed(summary, width=80):
    stream = io.StringIO()
    survey.print_summary(summary, Console(file=stream, width=width))
    return stream.getvalue()


def test_a_data_set_in_order_is_counted_and_has_no_problems(tree):
    summary = check.inspect(tree)
    assert (summary.frames, summary.questions, summary.errors, summary.warnings) == (4, 12, 0, 0)
    assert {name: (part.frames, part.sequences) for name, part in summary.splits.items()} == {
        "train": (2, ("seq_2", "seq_10")),
        "dev": (1, ("seq_6",)),
        "val": (1, ("seq_1",)),
    }
    train = summary.splits["train"]
    assert train.kinds == {"organ": 2, "state": 2, "location": 2, "tool": 0, "other": 0}
    assert {name: count for name, count in train.answers.items() if count} == {
        "kidney": 2,
        "Idle": 2,
        "left-bottom": 2,
    }
    assert tuple(train.answers) == vocabulary.CLASSES
    assert summary.image_sizes == {"60x40": 4}
    assert summary.location_rule == LocationRule("organ", "larger_y")
    assert (summary.location_agreement, summary.location_questions) == (1.0, 4)
    assert set(summary.floors) == {"train -> train", "train -> dev", "train -> val", "dev -> dev", "val -> val"}
    assert summary.floors["train -> val"]["all"] == floors.Score(3, 1.0, 1.0)


def test_every_kind_of_problem_is_found_in_one_pass(tree):
    (tree / "seq_2" / "vqla" / "label" / "frame000_QAL.txt").write_text(
        GOOD + "What is the state of suction?|Idle|2,3,90,30\n" + "What?|Idle|1,1,2,2\n" + "a|b\n"
    )
    truncated = write(tree, "seq_3/frame000", colour=9, size=(600, 400))
    truncated.write_bytes(truncated.read_bytes()[:-40])
    empty = write(tree, "seq_3/frame001", colour=10)
    empty.write_bytes(b"")
    summary = check.inspect(tree)
    found = {(problem.severity, Path(problem.source).name.split(":")[0]) for problem in summary.problems}
    assert found == {
        ("warning", "frame000_QAL.txt"),  # the box outside, and the question asked again
        ("error", "frame000_QAL.txt"),  # two bad lines
        ("error", "frame000.png"),
        ("error", "frame001_QAL.txt"),  # its image has no header
    }
    assert (summary.errors, summary.warnings, summary.outside, summary.repeated) == (4, 2, 1, 1)
    strict = check.inspect(tree, strict=True)
    assert (strict.errors, strict.warnings, strict.outside, strict.repeated) == (5, 0, 1, 0)


def test_the_same_image_in_two_splits_is_an_error(tree):
    copied = write(tree, "seq_16/frame003", colour=1)  # as seq_10/frame000
    write(tree, "seq_12/frame005", colour=77)
    write(tree, "seq_6/frame005", colour=77)  # both in dev
    summary = check.inspect(tree)
    assert summary.equal_images == (("seq_10/frame000", "seq_16/frame003"),)
    (problem,) = summary.problems
    assert (problem.severity, problem.source) == ("error", str(copied))
    assert str(tree / "seq_10" / "left_frames" / "frame000.png") in problem.reason


def test_endovis17_is_external_and_its_floor_is_its_own(tmp_path):
    (tmp_path / "vqla").mkdir()
    (tmp_path / "left_frames").mkdir()
    (tmp_path / "vqla" / "seq1_frame000.txt").write_text("Where is suction located?|left-top|1,1,9,9")
    Image.new("RGB", (60, 40)).save(tmp_path / "left_frames" / "seq1_frame000.jpg")
    summary = check.inspect(tmp_path)
    assert list(summary.splits) == ["external"] and list(summary.floors) == ["external -> external"]
    assert summary.location_rule == LocationRule("image", "smaller_y")


@pytest.mark.parametrize("width", [80, 140])
def test_tables_line_up_and_show_every_class(tree, width):
    lines = printed(check.inspect(tree), width).splitlines()
    tables, rows = [], []
    for line in [*lines, ""]:
        if line and line[0] in "┏┃┡│└":
            rows.append(line)
        elif rows:
            tables.append(rows)
            rows = []
    assert len(tables) == 3
    for rows in tables:
        borders = {tuple(i for i, char in enumerate(row) if char in "┃│") for row in rows if row[0] in "┃│"}
        assert len(borders) == 1 and len({len(row) for row in rows}) == 1
    assert all(any(line.startswith(f"│ {name} ") for line in lines) for name in vocabulary.CLASSES)
    assert lines[-1] == "0 errors, 0 warnings"


def test_fifty_problems_are_printed_errors_first_and_all_are_counted(tree):
    bad = "[bold]What[/bold]\x1b[2J?|Idle|1,1,2,2\n"
    again = "What is the state of suction?|Idle|2,3,40,30\n"
    write(tree, "seq_2/frame000", GOOD + 10 * again + 60 * bad)
    summary = check.inspect(tree)
    assert (summary.errors, summary.warnings) == (60, 10)
    text = printed(summary)
    assert text.count("\nerror: ") == 50 and "\nwarning: " not in text
    assert "... and 20 more problems\n60 errors, 10 warnings\n" in text
    assert "[bold]What[/bold]" in text and "\x1b" not in text
    assert f"error: {tree}/seq_2/vqla/label/frame000_QAL.txt:14:1: unknown question" in text  # not wrapped


def test_main_writes_the_whole_summary_as_json_and_returns_one_for_errors(tree, tmp_path, capsys):
    path = tmp_path / "summary.json"
    assert survey.main(tree, json_path=path) == 0
    stored = json.loads(path.read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(check.inspect(tree))))
    assert stored["floors"]["train -> val"]["organ"] == {"questions": 1, "accuracy": 1.0, "miou": 1.0}
    write(tree, "seq_2/frame001", "a|b|c|d\n")
    assert survey.main(tree) == 1
    assert "1 errors, 0 warnings" in capsys.readouterr().out
    with pytest.raises(InputError, match="cannot be written"):
        survey.main(tree, json_path=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        survey.main(tree / "nowhere")


def test_a_data_set_of_errors_alone_is_reported_not_raised(tmp_path):
    write(tmp_path, "seq_2/frame000", "a|b\n")
    summary = check.inspect(tmp_path)
    assert (summary.frames, summary.errors, summary.splits, summary.floors) == (0, 1, {}, {})
    assert "1 errors" in printed(summary)


def test_progress_sees_every_image(tree):
    seen = []

    def track(steps, total):
        for step in steps:
            seen.append(total)
            yield step

    check.inspect(tree, track=track)
    assert seen == [4, 4, 4, 4]


def test_check_and_reader_agree_on_what_is_kept(tree):
    write(tree, "seq_2/frame000", GOOD + "a|b\n")
    problems = []
    frames = records.read(tree, on_problem=problems.append)
    summary = check.inspect(tree)
    assert summary.questions == sum(len(frame.records) for frame in frames)
    assert list(summary.problems) == problems


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is missing")
def test_the_real_frames_pass_with_their_one_box_outside():
    summary = check.inspect(REAL)
    assert (summary.frames, summary.questions, summary.errors, summary.outside) == (13, 85, 0, 2)
    assert summary.image_sizes == {"1280x1024": 13}
    assert (summary.location_agreement, summary.location_questions) == (1.0, 36)
    assert "holds for 36 of 36 location answers" in printed(summary)
    assert check.inspect(REAL, strict=True).errors == 2
