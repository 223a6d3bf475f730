import logging
import os
import random
import re
import struct
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from surgery_r1_jax import labels, records, vocabulary
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.records import Frame

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18"
ORGAN = "What organ is being operated?|kidney|1,1,61,41"
STATE = "What is the state of suction?|Suction|2,3,40,30"
PLACE = "Where is suction located?|left-top|2,3,40,30"


def write(root, labels_at, image_at, text=f"{ORGAN}\n{STATE}\n{PLACE}\n", size=(60, 40)):
    """One label file and its image, both given relative to `root`."""
    for path in (root / labels_at, root / image_at):
        path.parent.mkdir(parents=True, exist_ok=True)
    (root / labels_at).write_bytes(text if isinstance(text, bytes) else text.encode())
    Image.new("RGB", size, (120, 30, 30)).save(root / image_at)


def write_18(root, name="seq_2/frame000", **options):
    sequence, frame = name.split("/")
    write(root, f"{sequence}/vqla/label/{frame}_QAL.txt", f"{sequence}/left_frames/{frame}.png", **options)
    return root / sequence / "vqla" / "label" / f"{frame}_QAL.txt"


def collect(root, **options):
    problems = []
    return records.read(root, on_problem=problems.append, **options), problems


@pytest.mark.parametrize("suffix", ["_QAL", "_QA", ""])
@pytest.mark.parametrize("folder", ["vqla/label", "vqla"])
@pytest.mark.parametrize("parent", ["", "Train_Data/", "EndoVis-18-VQLA/Train_Data/"])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_every_layout_of_endovis18_is_read(tmp_path, suffix, folder, parent, ending):
    home = f"{parent}seq_14"
    write(tmp_path, f"{home}/{folder}/frame007{suffix}.txt", f"{home}/left_frames/frame007.{ending}")
    (frame,) = records.read(tmp_path)
    assert (frame.id, frame.sequence, frame.width, frame.height) == ("seq_14/frame007", "seq_14", 60, 40)
    assert frame.image == tmp_path / home / "left_frames" / f"frame007.{ending}"
    assert [record.answer for record in frame.records] == ["kidney", "Suction", "left-top"]
    assert frame.records[2].source == f"{tmp_path / home / folder / 'frame007'}{suffix}.txt:3"
    assert frame.organ_box == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("suffix", ["_QAL", ""])
@pytest.mark.parametrize("folder", ["vqla/label", "vqla"])
@pytest.mark.parametrize("parent", ["", "EndoVis-17-VQLA/"])
def test_every_layout_of_endovis17_is_read(tmp_path, suffix, folder, parent):
    write(
        tmp_path,
        f"{parent}{folder}/seq9_frame030{suffix}.txt",
        f"{parent}left_frames/seq9_frame030.jpg",
        text=f"{STATE}\r\n{PLACE}",
    )
    (frame,) = records.read(tmp_path)
    assert (frame.id, frame.sequence, len(frame.records)) == ("seq9/frame030", "seq9", 2)
    assert frame.organ_box is None
    with pytest.raises(InputError, match="split train is empty; the sequences found: seq9"):
        records.split([frame], "train")
    assert records.split([frame], "all") == [frame]


def test_sequences_and_frames_come_in_natural_order(tmp_path):
    names = ["seq_2/frame2", "seq_2/frame10", "seq_10/frame1", "seq_11/frame1"]
    for name in reversed(names):
        write_18(tmp_path, name)
    assert [frame.id for frame in records.read(tmp_path)] == names


def test_one_sequence_folder_can_be_read_alone_and_from_inside(tmp_path, monkeypatch):
    write_18(tmp_path)
    assert records.read(tmp_path / "seq_2")[0].id == "seq_2/frame000"
    monkeypatch.chdir(tmp_path / "seq_2")
    assert records.read(".")[0].id == "seq_2/frame000"


def test_what_archivers_and_file_managers_leave_behind_is_ignored(tmp_path):
    write_18(tmp_path)
    (tmp_path / "seq_2" / "vqla" / "label" / "._frame000_QAL.txt").write_bytes(b"\0\5\x16\7")
    for folder in ("__MACOSX/seq_2/vqla/label", ".cache/seq_2/vqla", "seq_2/vqla/img_features/5x5"):
        (tmp_path / folder).mkdir(parents=True)
    frames, problems = collect(tmp_path)
    assert len(frames) == 1 and not problems


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "no labels; expected seq_N"),
        (lambda root: write(root, "vqla/seq2_f1.txt", "left_frames/seq2_f1.jpg") or write_18(root), "more than one"),
    ],
)
def test_a_root_that_is_not_one_data_set_is_refused_even_when_collecting(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        collect(tmp_path / "data")


def test_a_byte_order_mark_windows_lines_and_blank_lines_are_read(tmp_path):
    text = b"\xef\xbb\xbf" + f"{ORGAN}\r\n\r\n{STATE}\r\n  \r\n".encode()
    path = write_18(tmp_path, text=text)
    (frame,) = records.read(tmp_path)
    assert [record.source for record in frame.records] == [f"{path}:1", f"{path}:3"]


def test_the_first_error_stops_reading_and_names_file_line_and_remedy(tmp_path):
    path = write_18(tmp_path, text=f"{ORGAN}\nWhat?|Idle|1,1,2,2\n")
    with pytest.raises(InputError) as caught:
        records.read(tmp_path)
    assert str(caught.value).startswith(f"{path}:2:1: unknown question 'What?'; ")
    assert "data check" in str(caught.value) and "\n" not in str(caught.value)


def test_collecting_costs_only_the_bad_lines(tmp_path):
    path = write_18(tmp_path, text=f"{ORGAN}\nWhat?|Idle|1,1,2,2\n{STATE}|\n{PLACE}\n".encode() + b"\xff\n")
    write_18(tmp_path, "seq_3/frame000", text="nothing right here\n")
    frames, problems = collect(tmp_path)
    assert [[record.answer for record in frame.records] for frame in frames] == [["kidney", "left-top"]]
    expected = [f"{path}:2:1", f"{path}:3:1", f"{path}:5:1"]
    assert [problem.source for problem in problems[:3]] == expected
    assert len(problems) == 4 and {problem.severity for problem in problems} == {"error"}


def test_a_box_outside_is_clipped_and_logged_or_refused_when_strict(tmp_path, caplog):
    path = write_18(tmp_path, text=f"{ORGAN}\nWhat is the state of stapler?|Idle|0,1,62,9\n")
    with caplog.at_level(logging.WARNING):
        (frame,) = records.read(tmp_path)
    assert frame.records[1].box == (0.0, 0.0, 1.0, 8 / 40)
    assert f"1 warnings, the first: {path}:2:36: box leaves the image" in caplog.text
    with pytest.raises(InputError, match="box leaves the image"):
        records.read(tmp_path, strict=True)


def test_a_question_asked_twice_is_kept_with_a_warning(tmp_path):
    path = write_18(tmp_path, text=f"{ORGAN}\n{STATE}\n{STATE.replace('2,3', '5,6')}\n")
    (frame,), (problem,) = collect(tmp_path)
    assert len(frame.records) == 3
    assert str(problem) == f"{path}:3: {records.REPEATED}, first on line 2; both are kept"
    assert problem.severity == "warning"


def test_a_second_label_file_for_a_frame_is_an_error(tmp_path):
    first = write_18(tmp_path)
    first.with_name("frame000.txt").write_text(ORGAN)
    frames, (problem,) = collect(tmp_path)
    assert len(frames) == 1
    assert "second label file for frame seq_2/frame000" in problem.reason


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))


def gif(path):
    Image.new("P", (9, 9)).save(path, "GIF")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (Path.unlink, "is missing"),
        (lambda image: image.write_bytes(b""), "not a whole PNG or JPEG"),
        (lambda image: image.write_bytes(image.read_bytes()[:20]), "not a whole PNG or JPEG"),
        (lambda image: image.write_text("<html>"), "not a whole PNG or JPEG"),
        (gif, "not a whole PNG or JPEG"),
        (lambda image: image.write_bytes(BOMB), "not a whole PNG or JPEG"),
        (lambda image: image.unlink() or image.mkdir(), "not an ordinary file"),
        (lambda image: image.unlink() or os.mkfifo(image), "not an ordinary file"),
        (lambda image: image.unlink() or image.symlink_to("/dev/zero"), "leads out of"),
        (lambda image: image.unlink() or image.symlink_to("nowhere.png"), "cannot be opened"),
        (lambda image: image.unlink() or image.symlink_to(image.name), "cannot be opened"),
    ],
)
def test_a_missing_or_broken_image_is_an_error_of_its_label_file(tmp_path, damage, reason):
    path = write_18(tmp_path)
    write_18(tmp_path, "seq_3/frame000")
    damage(tmp_path / "seq_2" / "left_frames" / "frame000.png")
    frames, (problem,) = collect(tmp_path)
    assert [frame.id for frame in frames] == ["seq_3/frame000"]
    assert problem.source == f"{path}:1" and reason in problem.reason


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: path.write_text(" \n"), "without a question"),
        (lambda path: path.write_bytes(b"x" * (1 << 20) + b"x"), "more than 1048576 bytes"),
        (lambda path: path.unlink() or os.mkfifo(path), "not an ordinary file"),
        (lambda path: path.unlink() or path.mkdir(), "not an ordinary file"),
    ],
)
def test_a_label_file_that_cannot_be_one_is_an_error(tmp_path, damage, reason):
    path = write_18(tmp_path)
    damage(path)
    frames, (problem,) = collect(tmp_path)
    assert not frames and str(problem).startswith(f"{path}:1: ") and reason in problem.reason


OPENED = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


@pytest.mark.parametrize(
    "link, source",
    [
        ("seq_2", "seq_2"),
        ("seq_2/vqla", "seq_2/vqla"),
        ("seq_2/vqla/label", "seq_2/vqla/label/frame000_QAL.txt:1"),
        ("seq_2/vqla/label/frame000_QAL.txt", "seq_2/vqla/label/frame000_QAL.txt:1"),
        ("seq_2/left_frames", "seq_2/vqla/label/frame000_QAL.txt:1"),
        ("seq_2/left_frames/frame000.png", "seq_2/vqla/label/frame000_QAL.txt:1"),
    ],
)
def test_nothing_outside_of_the_root_is_opened(tmp_path, link, source):
    root, outside = tmp_path / "data", tmp_path / "outside"
    write_18(root)
    write_18(root, "seq_3/frame000")
    outside.mkdir()
    (root / link).rename(outside / "target")
    (root / link).symlink_to(outside / "target")
    OPENED.clear()
    frames, problems = collect(root)
    assert [frame.id for frame in frames] == ["seq_3/frame000"]
    assert [problem.source for problem in problems] == [str(root / source)]
    assert "leads out of the data's folder" in problems[0].reason
    assert any(str(root) in name for name in OPENED)  # the hook does see
    assert not any(os.path.realpath(name).startswith(str(outside)) for name in OPENED)


def test_links_inside_of_the_root_are_followed(tmp_path):
    write_18(tmp_path)
    image = tmp_path / "seq_2" / "left_frames" / "frame000.png"
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    assert len(records.read(tmp_path)) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_width_and_height_are_those_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for index, (kind, ending) in enumerate((("JPEG", "jpg"), ("PNG", "png"))):
        write(tmp_path, f"seq_2/vqla/f{index}.txt", f"seq_2/left_frames/f{index}.{ending}")
        image = tmp_path / "seq_2" / "left_frames" / f"f{index}.{ending}"
        Image.new("RGB", (60, 40)).save(image, kind, exif=exif)
    sizes = {(frame.width, frame.height) for frame in records.read(tmp_path)}
    assert sizes == {(40, 60) if orientation > 4 else (60, 40)}


def some_frames(*sequences):
    return [Frame(f"{name}/f", name, Path("x"), 1, 1, ()) for name in sequences]


def test_every_sequence_is_in_exactly_one_split():
    frames = some_frames(*(f"seq_{n}" for n in range(1, 17)))
    parts = [records.split(frames, name) for name in ("train", "dev", "val")]
    assert [frame.sequence for frame in parts[2]] == ["seq_1", "seq_5", "seq_16"]
    assert [frame.sequence for frame in parts[1]] == list(records.DEV_SEQUENCES)
    assert sorted(frame.id for part in parts for frame in part) == sorted(frame.id for frame in frames)
    assert records.split(frames, "all") == frames
    assert [f.sequence for f in records.split(frames, "dev", dev_sequences=["seq_2"])] == ["seq_2"]


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("test", {}, "unknown split 'test'; take train, dev, val or all"),
        ("val", {}, "split val is empty; the sequences found: seq_2, seq_10;"),
        ("dev", {"dev_sequences": ["seq_5"]}, "seq_5 is in val"),
    ],
)
def test_a_split_that_cannot_be_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        records.split(some_frames("seq_10", "seq_2"), name, **options)


def test_equal_image_files_are_found_whatever_their_names(tmp_path):
    colours = {"a": 1, "b": 2, "c": 1, "d": 3}
    frames = {}
    for name, value in colours.items():
        Image.new("L", (4, 4), value).save(tmp_path / f"{name}.png")
        frames[name] = Frame(name, "seq_2", tmp_path / f"{name}.png", 4, 4, ())
    (tmp_path / "long.png").write_bytes((tmp_path / "a.png").read_bytes() + b"\0")
    longer = Frame("long", "seq_3", tmp_path / "long.png", 4, 4, ())
    overlaps = records.content_overlaps([frames["a"], frames["b"]], [frames["c"], frames["d"], longer])
    assert overlaps == [("a", "c")]


def separators_free(text):
    return re.sub("[_ -]", "[_ -]", re.escape(text).replace("\\", "").replace("?", r"\?"))


def oracle():
    """What a line has to match, written from the format's description as one regular expression."""
    tool = "|".join(map(separators_free, vocabulary.TOOLS))
    state = "|".join(map(separators_free, vocabulary.STATES))
    place = "|".join(map(separators_free, vocabulary.LOCATIONS))
    pairs = [
        (separators_free("What organ is being operated?"), "kidney"),
        (f"{separators_free('What is the state of ')}(?:{tool})\\?", state),
        (f"{separators_free('Where is ')}(?:{tool}){separators_free(' located?')}", place),
    ]
    gap = "[ \t]*"
    body = "|".join(f"{question}{gap}\\|{gap}(?:{answer})" for question, answer in pairs)
    corner = f"{gap}(-?[0-9]{{1,6}}){gap}"
    pattern = re.compile(f"{gap}(?:{body}){gap}\\|{','.join([corner] * 4)}", re.ASCII | re.IGNORECASE)

    def accepts(line: bytes, width, height):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            return False
        match = pattern.fullmatch(text.removesuffix("\r"))
        if not match or len(text) > 500:
            return False
        x0, y0, x1, y1 = map(int, match.groups())
        return max(x0, 1) < min(x1, width + 1) and max(y0, 1) < min(y1, height + 1)

    return accepts


def mutate(line: bytes, rng: random.Random) -> bytes:
    """One small change, of a kind that hands and programs make."""
    text = line.decode()
    question, answer, box = text.split("|")
    corners = box.split(",")
    spot = rng.randrange(len(line))
    return rng.choice(
        [
            lambda: line[:spot] + line[spot + 1 :],
            lambda: line[:spot] + bytes([rng.choice(b" 0|,_-.x\xff\x00\t")]) + line[spot:],
            lambda: text.swapcase().encode(),
            lambda: text.replace("_", " ").encode(),
            lambda: text.replace("_", "-").replace(" is", "_is").encode(),
            lambda: f" {question} |\t{answer} | {', '.join(corners)} ".encode(),
            lambda: line + b"\r",
            lambda: line + b" " * rng.choice([3, 600]),
            lambda: f"{question}|{answer}".encode(),
            lambda: f"{question}|{box}|{answer}".encode(),
            lambda: f"{text}|{box}".encode(),
            lambda: f"{question}|{rng.choice(vocabulary.EXTENDED_CLASSES)}|{box}".encode(),
            lambda: f"{question}|{answer}|{','.join(rng.sample(corners, 4))}".encode(),
            lambda: f"{question}|{answer}|{','.join(str(rng.randint(-20, 80)) for _ in range(4))}".encode(),
            lambda: f"{question}|{answer}|{','.join(corners[: rng.choice([2, 3])])}".encode(),
            lambda: f"{question}|{answer}|{box.replace(corners[2], rng.choice(WEIRD))}".encode(),
            lambda: text.replace("i", "\u0131", 1).encode(),
            lambda: text.encode("utf-16-le"),
        ]
    )()


WEIRD = ("1_000", "\uff14\uff10", "9" * 4301, "nan", "1e1", "40.0", "040", "0x28", "\u0664\u0660", "--4", "-4", "")


def test_1000_mutated_files_are_accepted_or_refused_as_an_independent_oracle_says(tmp_path):
    rng = random.Random(8)
    accepts = oracle()
    good = [line.encode() for line in (ORGAN, STATE, PLACE, STATE.replace("suction", "clip_applier"))]
    assert all(accepts(line, 60, 40) for line in good)
    expected, refused_at = {}, {}
    for index in range(1000):
        lines = list(good)
        number = rng.randrange(len(lines))
        lines[number] = mutate(lines[number], rng).replace(b"\n", b"")
        path = write_18(tmp_path, f"seq_2/frame{index:04}", text=b"\n".join(lines))
        right = accepts(lines[number], 60, 40)
        expected[f"seq_2/frame{index:04}"] = [n + 1 for n in range(4) if right or n != number]
        if not right:
            refused_at[f"{path}:{number + 1}"] = lines[number]
    frames, problems = collect(tmp_path)

    found = {frame.id: [int(record.source.rsplit(":", 1)[1]) for record in frame.records] for frame in frames}
    assert found == expected  # all that is right is kept, nothing else
    errors = [problem for problem in problems if problem.severity == "error"]
    places = {problem.source.rpartition(":")[0]: int(problem.source.rpartition(":")[2]) for problem in errors}
    assert places.keys() == refused_at.keys() and len(errors) == len(places)
    assert 400 < len(errors) < 700  # both verdicts are well represented
    for problem in errors:
        line, column = refused_at[problem.source.rpartition(":")[0]], places[problem.source.rpartition(":")[0]]
        fields = [1 + len(b"|".join(line.split(b"|")[:n]).decode("utf-8", "replace")) + (n > 0) for n in range(3)]
        assert column in fields or column == 501 or problem.reason == "not UTF-8"
    assert all(str(problem).isprintable() for problem in problems)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is missing")
def test_the_13_real_frames_are_read_and_their_one_box_outside_is_found():
    frames, problems = collect(REAL)
    assert (len(frames), sum(len(frame.records) for frame in frames)) == (13, 85)
    assert {(frame.width, frame.height) for frame in frames} == {(1280, 1024)}
    assert [frame.sequence for frame in frames[:3]] == ["seq_1", "seq_1", "seq_3"]
    assert all(frame.organ_box for frame in frames)
    # One box, on the lines of its state and of its location.
    assert [p.source.split("/")[-1] for p in problems] == ["frame003_QA.txt:3:54", "frame003_QA.txt:5:54"]
    assert {p.severity for p in problems} == {"warning"}
    assert all(p.reason == f"{labels.OUTSIDE}: 7,976,19,1260 on 1280x1024; it is clipped" for p in problems)
    scissors = next(frame for frame in frames if frame.id == "seq_4/frame003").records[2]
    assert scissors.box == (6 / 1280, 975 / 1024, 18 / 1280, 1.0)
    strict_frames, strict_problems = collect(REAL, strict=True)
    assert sum(len(frame.records) for frame in strict_frames) == 83
    assert [p.severity for p in strict_problems] == ["error", "error"]
