import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from surgery_r1_jax import check, cli, recordfile, records, vocabulary
from surgery_r1_jax.errors import InputError

HEAD = "image,question,answer,bbox"
ROW = {"image": "a.png", "question": "Is the jaw open?", "answer": "open", "bbox": [10, 20, 30, 40]}


def write(root, text, name="records.csv", images=("a.png",), size=(64, 48), about='{"boxes": "pixel"}'):
    """A folder with a table of records and images of one size."""
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (40, 90, 60)).save(root / image)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    if about is not None:
        (root / "data.json").write_text(about)
    return root


def lines(*rows):
    return "".join(json.dumps(ROW | row) + "\n" for row in rows)


def write_lines(root, *rows, **options):
    images = {row.get("image", "a.png") for row in rows}
    return write(root, lines(*rows), "records.jsonl", images, **options)


def collect(root, **options):
    problems = []
    return records.read(root, on_problem=problems.append, **options), problems


def errors_of(root, **options):
    return [str(problem) for problem in collect(root, **options)[1] if problem.severity == "error"]


# What is read


def test_jsonl_and_csv_tell_the_same(tmp_path):
    rows = [
        {"sequence": "op1", "split": "train", "reasoning": "The jaw, at left, is wide."},
        {"sequence": "op2", "split": "dev", "image": "b/c.jpg", "answer": "closed", "bbox": [0, 0.5, 64, 48]},
    ]
    one = write_lines(tmp_path / "one", *rows)
    two = write(tmp_path / "two", "", images=("a.png", "b/c.jpg"))
    with (two / "records.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, [*ROW, "sequence", "split", "reasoning"], restval="")
        table.writeheader()
        table.writerows(ROW | row for row in rows)

    def told(root):
        return [
            (
                f.id,
                f.sequence,
                f.split,
                f.width,
                f.height,
                f.classes,
                r.question,
                r.answer,
                r.box,
                r.kind,
                r.think,
                r.want,
            )
            for f in records.read(root)
            for r in f.records
        ]

    assert told(one) == told(two)
    (first, second) = told(one)
    assert first[:6] == ("a.png", "op1", "train", 64, 48, ("closed", "open"))
    assert first[8:] == ((10 / 64, 20 / 48, 30 / 64, 40 / 48), vocabulary.OTHER, rows[0]["reasoning"], None)
    assert second[:3] == ("b/c.jpg", "op2", "dev") and second[8] == (0, 0.5 / 48, 1, 1)


@pytest.mark.parametrize("units", recordfile.BOXES)
@pytest.mark.parametrize("spelling", ["list", "text", "commas", "brackets"])
def test_a_box_means_the_same_in_each_unit_and_spelling(tmp_path, units, spelling):
    size, box = (640, 480), np.array([0.125, 0.25, 0.5, 1.0])
    scale = {"pixel": [*size, *size], "unit": [1] * 4, "thousand": [1000] * 4}[units]
    edges = (box * scale).tolist()
    text = " ".join(map(str, edges))
    bbox = {"list": edges, "text": text, "commas": text.replace(" ", ", "), "brackets": str(edges)}[spelling]
    root = write_lines(tmp_path, {"bbox": bbox}, size=size, about=json.dumps({"boxes": units}))
    assert records.read(root)[0].records[0].box == pytest.approx(tuple(box), abs=1e-12)


def test_units_are_declared_once_by_the_data_or_by_the_reader(tmp_path):
    root = write_lines(tmp_path, {"bbox": [0, 0, 32, 24]}, about=None)
    with pytest.raises(
        InputError, match=r"what are its boxes written in\?.*data\.json, or give --boxes or data\.boxes"
    ):
        records.read(root)
    assert records.read(root, boxes="pixel")[0].records[0].box == (0, 0, 0.5, 0.5)
    assert records.read(root, boxes="thousand")[0].records[0].box == (0, 0, 0.032, 0.024)
    (root / "data.json").write_text('{"boxes": "pixel", "name": "mine"}')
    assert records.read(root, boxes="pixel")
    with pytest.raises(InputError, match="declares boxes in pixel, not in unit"):
        records.read(root, boxes="unit")


def test_published_questions_get_their_official_words_and_others_keep_their_own(tmp_path):
    own = "How far is the needle driver opened?"
    asked = [
        ("what organ is being operated?", "kidney"),
        ("Where is bipolar forceps located?", "left-top"),
        (own, "Idle"),
    ]
    (frame,) = records.read(write_lines(tmp_path, *({"question": q, "answer": a} for q, a in asked)))
    assert [(r.question, r.kind, r.tool) for r in frame.records] == [
        ("What organ is being operated?", vocabulary.ORGAN, None),
        ("Where is bipolar_forceps located?", vocabulary.LOCATION, "bipolar_forceps"),
        (own, vocabulary.STATE, None),
    ]
    assert frame.classes == vocabulary.CLASSES and frame.organ_box == frame.records[0].box


@pytest.mark.parametrize(
    ("answers", "classes"),
    [
        (["kidney", "left top"], vocabulary.CLASSES),
        (["kidney", "stapler"], vocabulary.EXTENDED_CLASSES),
        (["half-open", "open", "Half Open"], ("Half Open", "open")),
        (["grade 10", "grade 2"], ("grade 2", "grade 10")),
    ],
)
def test_classes_that_are_not_declared_are_those_of_the_answers(tmp_path, answers, classes):
    (frame,) = records.read(write_lines(tmp_path, *({"answer": answer} for answer in answers)))
    assert frame.classes == classes
    assert {record.answer for record in frame.records} <= set(classes)


def test_declared_classes_are_the_only_answers(tmp_path):
    root = write_lines(tmp_path, {}, {"answer": "shut"}, about='{"boxes": "pixel", "classes": ["shut tight", "open"]}')
    frames, _ = collect(root)
    assert frames[0].classes == ("shut tight", "open") and len(frames[0].records) == 1
    assert errors_of(root) == [f"{root / 'records.jsonl'}:2: answer 'shut' is none of the 2 classes"]


def test_classes_of_a_published_layout_are_declared_too(tmp_path):
    for name in ("seq_2/vqla/label", "seq_2/left_frames"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "seq_2/left_frames/frame000.png")
    (tmp_path / "seq_2/vqla/label/frame000.txt").write_text("What is the state of suction?|jammed|1,1,20,20\n")
    with pytest.raises(InputError, match="none of the 18"):
        records.read(tmp_path)
    (tmp_path / "data.json").write_text('{"classes": ["jammed", "free"]}')
    (frame,) = records.read(tmp_path)
    assert (frame.classes, frame.records[0].answer) == (("jammed", "free"), "jammed")


# The form of a record


FORMS = [
    ({}, (None, None)),
    ({"reasoning": "It gapes."}, ("It gapes.", None)),
    ({"want": "box"}, ("", 1)),
    ({"want": "answer", "reasoning": "It gapes."}, ("It gapes.", 0)),
    ({"kind": "vqla_direct", "want": "both"}, ("", 2)),
    ({"kind": "grounding_cot", "reasoning": "It gapes."}, ("It gapes.", 1)),
]


@pytest.mark.parametrize(("row", "form"), FORMS)
def test_a_record_tells_what_it_wants_and_its_reasoning(tmp_path, row, form):
    (frame,) = records.read(write_lines(tmp_path, row))
    assert (frame.records[0].think, frame.records[0].want) == form


@pytest.mark.parametrize(("boxes", "box"), [("pixel", "[16, 12, 32, 36]"), ("unit", "[0.25, 0.25, 0.5, 0.75]")])
def test_boxes_in_reasoning_are_written_as_those_of_the_table_and_read_as_pixels(tmp_path, boxes, box):
    row = {"reasoning": f"The jaw {box} gapes [sic].", "bbox": [0, 0, 1, 1]}
    (frame,) = records.read(write_lines(tmp_path, row, about=json.dumps({"boxes": boxes})))
    assert (frame.width, frame.height) == (64, 48)
    assert frame.records[0].think == "The jaw [16, 12, 32, 36] gapes [sic]."


def test_the_six_forms_of_a_question_are_no_repetition_but_a_seventh_is(tmp_path):
    rows = [{"kind": kind} | ({"reasoning": "It gapes."} if kind.endswith("cot") else {}) for kind in recordfile.FORMS]
    assert len(rows) == 6
    assert not [p for p in collect(write_lines(tmp_path, *rows))[1] if "again" in p.reason]
    repeated = [p for p in collect(write_lines(tmp_path, *rows, rows[2]))[1] if "again" in p.reason]
    assert [str(p) for p in repeated] == [
        f"{tmp_path / 'records.jsonl'}:7: question asked again, first on line 3; both are kept"
    ]


# Splits


def splits(root):
    return {frame.id: records.split_of_frame(frame) for frame in records.read(root)}


def test_the_column_split_decides(tmp_path):
    rows = [{"image": f"{name}.png", "split": name} for name in recordfile.SPLITS]
    assert splits(write_lines(tmp_path, *rows)) == {f"{name}.png": name for name in recordfile.SPLITS}
    assert [f.id for f in records.split(records.read(tmp_path), "dev")] == ["dev.png"]
    with pytest.raises(InputError, match="split 'test'; dev chooses the checkpoint, val is reported"):
        records.read(write_lines(tmp_path, {"split": "test"}))
    with pytest.raises(InputError, match=r"b\.png has no split and others have"):
        records.read(write_lines(tmp_path, {"split": "dev"}, {"image": "b.png"}))


@pytest.mark.parametrize(("count", "dev", "val"), [(1, 0, 0), (2, 1, 0), (3, 1, 1), (19, 1, 1), (25, 2, 2)])
def test_without_it_whole_sequences_are_held_out_and_that_is_told(tmp_path, count, dev, val):
    rows = [{"image": f"frames/op{i}/{j}.png"} for i in range(count) for j in range(2)]
    frames, problems = collect(write_lines(tmp_path, *rows))
    of_sequence = {}
    for frame in frames:
        of_sequence.setdefault(frame.sequence, set()).add(frame.split)
    assert all(len(split) == 1 for split in of_sequence.values()) and "op0" in of_sequence
    given = [split for (split,) in of_sequence.values()]
    assert given == ["train"] * (count - dev - val) + ["dev"] * dev + ["val"] * val
    assert "no column split; by sequences, train: op0" in problems[-1].reason


def test_published_sequences_keep_their_published_splits(tmp_path):
    rows = [{"image": f"frames/seq_{n}/frame000.png"} for n in (1, 2, 6)]
    found = {name.split("/")[1]: split for name, split in splits(write_lines(tmp_path, *rows)).items()}
    assert found == {"seq_1": "val", "seq_2": "train", "seq_6": "dev"}


def test_a_sequence_in_two_splits_is_told(tmp_path):
    rows = [{"image": f"{split}.png", "sequence": "op1", "split": split} for split in ("train", "val")]
    _, problems = collect(write_lines(tmp_path, *rows))
    assert [p.reason for p in problems] == ["sequence op1 is in train and val; its frames are near copies"]


# What is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "b/../a.png"}, "must be a path below"),
        ({"image": "/etc/passwd"}, "must be a path below"),
        ({"image": "none.png"}, "cannot be opened"),
        ({"image": "a\x00.png"}, "must be a path below"),
        ({"answer": ""}, "no answer"),
        ({"question": 3}, "question is not a text"),
        ({"question": "two\nlines"}, "one line of at most 500"),
        ({"question": "x" * 501}, "one line of at most 500"),
        ({"bbox": [1, 2, 3]}, "four numbers"),
        ({"bbox": "1 2 3 x"}, "four numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, "four numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "four numbers"),
        ({"bbox": [30, 20, 10, 40]}, "empty or inverted"),
        ({"bbox": [70, 20, 90, 40]}, "leaves the image: 70, 20, 90, 40 on 64x48, wholly"),
        ({"want": "all"}, "want 'all'; take answer, box, both"),
        ({"kind": "vqa"}, "kind 'vqa'; take vqa_direct"),
        ({"kind": "vqa_cot"}, "does not go with want None and no reasoning"),
        ({"kind": "vqa_direct", "want": "box"}, "does not go with want box"),
        ({"reasoning": "x" * 20_001}, "20000 is the most"),
    ],
)
def test_a_bad_line_costs_itself_and_is_named(tmp_path, row, reason):
    root = write(tmp_path, lines({}, row, {"question": "Is it closed?"}), "records.jsonl")
    frames, _ = collect(root)
    assert [record.source.rpartition(":")[2] for frame in frames for record in frame.records] == ["1", "3"]
    (error,) = errors_of(root)
    assert error.startswith(f"{root / 'records.jsonl'}:2: ") and reason in error
    with pytest.raises(InputError, match=r"records\.jsonl:2.*mend it; `surgery-r1 data check"):
        records.read(root)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]", "not a JSON object"),
        (b"{", "not a JSON object on one line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 9999, ""),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, reason):
    root = write(tmp_path, lines({}).encode() + line + b"\n", "records.jsonl")
    (error,) = errors_of(root)
    assert error.startswith(f"{root / 'records.jsonl'}:2: ") and reason in error


def test_a_box_over_the_edge_is_clipped_and_told_or_refused_when_strict(tmp_path):
    root = write_lines(tmp_path, {"bbox": [32, 24, 80, 48]})
    frames, problems = collect(root)
    assert frames[0].records[0].box == (0.5, 0.5, 1, 1)
    assert problems[0].severity == "warning" and "leaves the image" in problems[0].reason
    assert collect(root, strict=True)[0] == []
    rounded = write_lines(tmp_path, {"bbox": [0.5, 0.5, 1.0000004, 1]}, about='{"boxes": "unit"}')
    assert errors_of(rounded, strict=True) == []  # another program's rounding


def test_boxes_in_other_units_than_declared_do_not_pass(tmp_path):
    (error,) = errors_of(write_lines(tmp_path, {}, about='{"boxes": "unit"}'))
    assert "not in 0..1, as is declared; are the boxes in pixel or thousand?" in error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "records.csv:1: no column image, question, answer, bbox"),
        (f"{HEAD.replace('answer', 'anwser')}\na.png,q?,open,1 2 3 4\n", "records.csv:1: no column answer"),
        (f"{HEAD}\n", "holds no record"),
        (f"{HEAD}\na.png,q?,\xff,1 2 3 4\n".encode("latin-1"), "records.csv:2: not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_at_all_ends_it(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason):
        collect(write(tmp_path, text))


def test_a_csv_as_spreadsheets_write_it(tmp_path):
    rows = '"a.png";"Open, or\tnot?";"open";"1 2 30 40"'
    text = f"\ufeff{HEAD.replace(',', ';')}\r\n{rows}\r\n{rows.replace(chr(9), ' ')}\r\n\r\n"
    frames, problems = collect(write(tmp_path, text))
    assert [record.source for record in frames[0].records] == [f"{tmp_path / 'records.csv'}:3"]
    assert problems[0].source == f"{tmp_path / 'records.csv'}:2"  # the tab
    short = errors_of(write(tmp_path, f"{HEAD}\na.png,is it open, or not?,open,1 2 3 4\n"))
    assert short == [f"{tmp_path / 'records.csv'}:2: 5 fields where the first line has 4; put quotes around commas"]


def test_an_unknown_column_is_told_once(tmp_path):
    _, problems = collect(write_lines(tmp_path, {"splitt": "dev"}, {"splitt": "val", "question": "Closed?"}))
    assert [p.reason for p in problems if "splitt" in p.reason] == [
        "column 'splitt' is none of those known and is left out"
    ]


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"boxes": "pixels"}', "boxes in 'pixels'; take pixel, unit or thousand"),
        ('{"boxes": ["pixel"]}', "take pixel, unit or thousand"),
        ('{"boxes": "pixel", "classes": "open"}', "must be a list of names"),
        ('{"boxes": "pixel", "classes": ["open", "Open "]}', "printable ASCII"),
        ('{"boxes": "pixel", "classes": ["half open", "half-open"]}', "is there twice"),
        ('{"boxes": "pixel", "classes": ["say \\"open\\""]}', 'holds "'),
        ('{"boxes": "pixel", "classes": ["ge\\u00f6ffnet"]}', "ASCII"),
    ],
)
def test_a_declaration_that_cannot_be_meant_is_refused(tmp_path, about, reason):
    with pytest.raises(InputError, match=reason):
        records.read(write_lines(tmp_path, {}, about=about))


def test_links_do_not_lead_out_and_two_tables_are_one_too_many(tmp_path):
    outside = write_lines(tmp_path / "outside", {})
    root = write_lines(tmp_path / "root", {})
    (root / "a.png").unlink()
    (root / "a.png").symlink_to(outside / "a.png")
    assert "leads out" in errors_of(root)[0]
    (root / "records.jsonl").unlink()
    (root / "records.jsonl").symlink_to(outside / "records.jsonl")
    with pytest.raises(InputError, match="leads out"):
        records.read(root)
    (root / "records.csv").write_text("")
    with pytest.raises(InputError, match=r"holds records\.jsonl and records\.csv"):
        records.read(root)


def test_any_bytes_are_read_or_refused_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    whole = {
        "records.jsonl": lines({}, {"answer": "closed"}),
        "records.csv": f"{HEAD}\n" + "a.png,open?,open,1 2 3 4\n" * 2,
    }
    for (name, text), _ in itertools.product(whole.items(), range(60)):
        data = bytearray(text.encode())
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        root = write(tmp_path, bytes(data), name, images=())
        Image.new("RGB", (64, 48)).save(root / "a.png")
        try:
            collect(root)
        except InputError as error:
            assert "\n" not in str(error)
        (root / name).unlink()


def test_data_check_shows_own_classes_and_how_the_frames_are_split(tmp_path, capsys):
    rows = [
        {"image": f"op{i}/{i}.png", "answer": ("open", "closed")[i % 2], "bbox": [i, 2, 30 + i, 40]} for i in range(3)
    ]
    root = write_lines(tmp_path, *rows, about=None)
    for i in range(3):
        Image.new("RGB", (64, 48), (i, 0, 0)).save(root / f"op{i}/{i}.png")
    assert cli.main(["data", "check", str(root), "--boxes", "pixel"]) == 0
    told = capsys.readouterr().out
    assert "closed" in told and "kidney" not in told
    assert "by sequences, train: op0; dev: op1; val: op2" in told
    assert check.inspect(root, boxes="pixel").splits["dev"].kinds["other"] == 1
