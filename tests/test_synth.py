import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from surgery_r1_jax import drawing, location, records, scene, shapes, synth, vocabulary
from surgery_r1_jax.errors import InputError

STATISTICS = Path(__file__).resolve().parents[2] / "shared" / "data" / "endovis18" / "endovis18_stats.json"
SMALL = (112, 84)


def scenes_of(count, *, balance=0.0, seed=7):
    return [synth.scene_of(seed, number, balance=balance) for number in range(count)]


@pytest.fixture(scope="module")
def real_scenes():
    return scenes_of(1000)


@pytest.fixture(scope="module")
def even_scenes():
    return scenes_of(400, balance=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """28 frames, two of each sequence."""
    root = tmp_path_factory.mktemp("synth") / "data"
    names = synth.write(root, frames=28, seed=5, size=(160, 128), balance=0.5)
    return root, names


def hashes(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def alone(tool, state, variant=0, *, heading=0.4):
    """A scene with one instrument in the middle of the frame."""
    background = synth.scene_of(1, 0)
    ahead_2 = np.array((np.cos(heading), np.sin(heading)))
    joint_2 = np.array((0.625, 0.5)) - 1.2 * shapes.DESIGNS[tool].reach * ahead_2
    points = [tuple(point_2 / scene.CANVAS) for point_2 in (joint_2 - ahead_2, joint_2, np.array((0.625, 0.5)))]
    return dataclasses.replace(background, instruments=(scene.Instrument(tool, state, *points, variant),))


# What is written


def test_the_same_seed_writes_the_same_bytes_with_any_number_of_processes(tmp_path):
    for jobs in (1, 2):
        synth.write(tmp_path / str(jobs), frames=17, seed=3, size=(84, 56), jobs=jobs)
    written = hashes(tmp_path / "1")
    assert written == hashes(tmp_path / "2")
    assert len(written) == 2 * 17 + 1
    assert len(set(written.values())) == len(written), "two frames are the same"


def test_another_seed_writes_other_frames(tmp_path, folder):
    synth.write(tmp_path / "other", frames=2, seed=6, size=(160, 128), balance=0.5)
    root, _ = folder
    first = "seq_1/left_frames/frame000.png"
    assert hashes(tmp_path / "other")[first] != hashes(root)[first]


def test_the_reader_has_nothing_to_complain_about(folder):
    root, names = folder
    problems = []
    frames = records.read(root, strict=True, on_problem=problems.append)
    assert problems == []
    assert {frame.id for frame in frames} == set(names)
    assert {(frame.width, frame.height) for frame in frames} == {(160, 128)}
    for frame in frames:
        scene_ = synth.scene_of(5, names.index(frame.id), balance=0.5)
        asked = [(record.kind, record.tool) for record in frame.records]
        tools = [instrument.tool for instrument in scene_.instruments]
        kinds = (vocabulary.STATE, vocabulary.LOCATION)
        assert asked == [(vocabulary.ORGAN, None), *((kind, tool) for kind in kinds for tool in tools)]
        states = [record.answer for record in frame.records if record.kind == vocabulary.STATE]
        assert states == [instrument.state for instrument in scene_.instruments]


def test_the_official_sequences_take_turns_and_fill_every_split(folder):
    root, names = folder
    per_sequence = Counter(name.split("/")[0] for name in names)
    assert per_sequence == dict.fromkeys(synth.SEQUENCES, 2)
    frames = records.read(root)
    sizes = {name: len(records.split(frames, name)) for name in ("train", "dev", "val")}
    assert sizes == {"train": 18, "dev": 4, "val": 6}


def test_a_written_frame_can_be_drawn_again_from_its_number(folder):
    root, names = folder
    sequence, stem = names[9].split("/")
    picture, _ = synth.draw(synth.scene_of(5, 9, balance=0.5), (160, 128))
    with Image.open(root / sequence / "left_frames" / f"{stem}.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(picture))


def test_the_location_rule_of_the_labels_is_that_of_endovis(folder):
    root, _ = folder
    rule, agreement, count = location.fit(records.read(root))
    assert (rule, agreement) == (location.LocationRule("organ", "larger_y"), 1.0)
    assert count > 50


def test_the_folder_says_that_it_is_synthetic(folder):
    about = json.loads((folder[0] / "synthetic.json").read_text())
    assert about["what"].startswith("synthetic")
    assert (about["seed"], about["size"], about["balance"]) == (5, [160, 128], 0.5)


# What is refused

GOOD = {"frames": 1, "seed": 0, "size": (84, 56)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"size": (55, 84)}, "size is 55x84"),
        ({"size": (84, 5000)}, "size is 84x5000"),
        ({"size": (84,)}, "size is 84"),
        ({"max_tools": 0}, "max_tools is 0"),
        ({"max_tools": 5}, "max_tools is 5"),
        ({"balance": -0.1}, "balance is -0.1"),
        ({"balance": float("nan")}, "balance is nan"),
        ({"sequences": ()}, "sequences are none"),
        ({"sequences": ("seq_8",)}, "sequences are seq_8"),
        ({"sequences": ("seq_1", "seq_1")}, "take different ones"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_written(tmp_path, bad, message):
    with pytest.raises(InputError, match=message):
        synth.write(tmp_path / "new", **{**GOOD, **bad})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        synth.write(tmp_path, **GOOD)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; name a folder"):
        synth.write(tmp_path / "file", **GOOD)
    with pytest.raises(InputError, match="cannot write the frames"):
        synth.write(tmp_path / "file" / "below", **GOOD)


def test_an_empty_folder_may_be_filled(tmp_path):
    assert synth.write(tmp_path, **GOOD) == ["seq_1/frame000"]


# What is in a scene


def chi_square(observed, expected):
    """p-value that counts come from given shares; those expected fewer than five times are taken together."""
    total, whole = sum(observed.values()), sum(expected.values())
    assert set(observed) <= set(expected)
    pairs = [(observed[key], count * total / whole) for key, count in expected.items()]
    often = [pair for pair in pairs if pair[1] >= 5]
    rare = [pair for pair in pairs if pair[1] < 5]
    if rare and sum(pair[1] for pair in rare) > 0:
        often.append(tuple(map(sum, zip(*rare, strict=True))))
    return stats.chisquare(*zip(*often, strict=True)).pvalue if len(often) > 1 else 1.0


def test_instruments_occur_together_as_in_endovis(real_scenes):
    sets = Counter(tuple(sorted(i.tool for i in s.instruments)) for s in real_scenes)
    assert chi_square(sets, scene.TOOL_SETS) > 0.001


@pytest.mark.parametrize("tool", vocabulary.TOOLS)
def test_an_instrument_is_in_a_state_as_often_as_in_endovis(real_scenes, tool):
    states = Counter(i.state for s in real_scenes for i in s.instruments if i.tool == tool)
    assert sum(states.values()) > 10
    assert chi_square(states, scene.TOOL_STATES[tool]) > 0.001


@pytest.mark.parametrize("tool", vocabulary.TOOLS)
def test_full_balance_makes_instruments_and_their_states_equally_likely(even_scenes, tool):
    states = Counter(i.state for s in even_scenes for i in s.instruments if i.tool == tool)
    total = sum(len(s.instruments) for s in even_scenes)
    assert chi_square(states, dict.fromkeys(scene.TOOL_STATES[tool], 1)) > 0.001
    assert abs(sum(states.values()) - total / 8) < 4 * np.sqrt(total / 8)


def test_the_name_of_an_instrument_does_not_tell_where_it_is(real_scenes):
    found = {tool: Counter() for tool in vocabulary.TOOLS}
    for scene_ in real_scenes[:300]:
        organ, *boxes = drawing.boxes(scene_, SMALL)
        for instrument, box in zip(scene_.instruments, boxes, strict=True):
            found[instrument.tool][synth.RULE.answer(box, organ)] += 1
    guessed = sum(max(count.values()) for count in found.values()) / sum(map(Counter.total, found.values()))
    assert guessed < 0.45  # 0.58 in EndoVis-18-VQLA
    assert all(len(found[tool]) == 4 for tool in ("bipolar_forceps", "monopolar_curved_scissors", "prograsp_forceps"))


def test_no_instrument_hides_another_and_no_location_hangs_on_a_pixel(even_scenes):
    for scene_ in even_scenes:
        assert len({i.tool for i in scene_.instruments}) == len(scene_.instruments)
        tips = np.array([i.tip for i in scene_.instruments]) * scene.CANVAS
        assert np.all((tips > 0.1) & (tips < scene.CANVAS - 0.1))
        for one, other in itertools.permutations(scene_.instruments, 2):
            shaft_N2 = np.linspace(other.entry, other.joint, 60) * scene.CANVAS
            away_N = np.linalg.norm(np.array(one.tip) * scene.CANVAS - shaft_N2, axis=1)
            assert away_N.min() > 0.1 + shapes.DESIGNS[other.tool].radius  # 0.1: what a tip takes up
        centres = [np.array((x0 + x1, y0 + y1)) / 2 for x0, y0, x1, y1 in drawing.boxes(scene_, (320, 256))]
        assert all((np.abs(centre - centres[0]) > 2).all() for centre in centres[1:])


@pytest.mark.parametrize("most", [1, 2, 3])
def test_max_tools_is_a_limit(most):
    counts = {len(synth.scene_of(0, number, max_tools=most, balance=0.5).instruments) for number in range(60)}
    assert counts == set(range(1, most + 1))


def test_the_tables_are_those_of_the_statistics():
    if not STATISTICS.exists():
        pytest.skip(f"the statistics of EndoVis-18-VQLA are not at {STATISTICS}")
    known = json.loads(STATISTICS.read_text())["train"]
    assert {" + ".join(tools): count for tools, count in scene.TOOL_SETS.items()} == known["tool_sets"]
    assert known["tool_state"] == scene.TOOL_STATES
    for tool, counts in scene.TOOL_LOCATIONS.items():
        named = dict(zip(vocabulary.LOCATIONS, counts, strict=True))
        assert {name: count for name, count in named.items() if count} == known["tool_location"][tool]


# What is drawn


def silhouette(instrument, size):
    """Points of an instrument in pixels, by complex arithmetic: lines along each tube at 25 places across it."""
    entry, joint, tip = (
        complex(*(np.array(p) * scene.CANVAS)) for p in (instrument.entry, instrument.joint, instrument.tip)
    )
    scale = abs(tip - joint) / shapes.DESIGNS[instrument.tool].reach
    tubes = shapes.head(instrument.tool, instrument.variant, instrument.state == "Grasping")
    placed = [(tube, (tip - joint) / abs(tip - joint)) for tube in tubes]
    placed += [(tube, (joint - entry) / abs(joint - entry)) for tube in shapes.shaft(instrument.tool)]
    points = []
    for tube, turn in placed:
        path_N = tube.path_N2 @ (1, 1j)
        along_N = np.gradient(path_N)
        across_N = 1j * along_N / np.abs(along_N) * tube.radius_N
        knots = np.arange(len(path_N))
        fine = np.linspace(0, len(path_N) - 1, 1500)
        for side in np.linspace(-1, 1, 25):
            edge_N = path_N + side * across_N
            dense = np.interp(fine, knots, edge_N.real) + 1j * np.interp(fine, knots, edge_N.imag)
            points.append(joint + turn * scale * dense)
    points = np.concatenate(points)
    return np.stack([points.real, points.imag], -1) / scene.CANVAS * size


@pytest.mark.parametrize("size", [(160, 128), (320, 240)])
def test_boxes_are_the_tightest_about_what_is_in_the_frame(even_scenes, size):
    for scene_ in even_scenes[:6]:
        organ, *boxes = drawing.boxes(scene_, size)
        inside_HW = scene.bean(scene_.kidney, *np.meshgrid(*((np.arange(n) + 0.5) / n for n in size))) <= 1
        y_N, x_N = np.nonzero(inside_HW)
        assert np.allclose(organ, (x_N.min(), y_N.min(), x_N.max() + 1, y_N.max() + 1), atol=1)
        for instrument, box in zip(scene_.instruments, boxes, strict=True):
            points_N2 = silhouette(instrument, size)
            seen_N2 = points_N2[((points_N2 >= 0) & (points_N2 <= size)).all(1)]
            low_2, high_2 = seen_N2.min(0), seen_N2.max(0)
            assert np.allclose(box, (*low_2, *high_2), atol=1.3), instrument  # whole pixels, rounded outwards
            assert (low_2 > np.array(box[:2]) - 0.3).all() and (high_2 < np.array(box[2:]) + 0.3).all()
            assert 0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]


def test_an_idle_instrument_changes_the_picture_inside_its_box_only():
    for tool in vocabulary.TOOLS:
        scene_ = alone(tool, "Idle")
        picture, (_, (x0, y0, x1, y1)) = drawing.draw(scene_, (160, 128))
        without, _ = drawing.draw(dataclasses.replace(scene_, instruments=()), (160, 128))
        change_HW = np.abs(np.asarray(picture, int) - np.asarray(without, int)).max(-1)
        inside_HW = np.zeros_like(change_HW, bool)
        inside_HW[y0:y1, x0:x1] = True
        ratio_HW3 = (np.asarray(picture, int) + 1) / (np.asarray(without, int) + 1)
        # Outside there is the shadow: it darkens all colours alike and adds none.
        assert change_HW[inside_HW].max() > 100
        assert ratio_HW3[~inside_HW].max() < 1.1


@pytest.mark.parametrize("tool", vocabulary.TOOLS)
def test_every_state_has_a_cue_that_shows_in_a_picture_112_pixels_wide(tool):
    for variant in range(shapes.VARIANTS):
        cells = {}
        for state in scene.TOOL_STATES[tool]:
            picture, _ = drawing.draw(alone(tool, state, variant), SMALL)
            cells[state] = np.asarray(picture, float)[42 - 14 : 42 + 14, 56 - 14 : 56 + 14]
        for one, other in itertools.combinations(cells, 2):
            changed = np.abs(cells[one] - cells[other]).max(-1) > 40
            assert changed.mean() > 0.08, (one, other)


def test_every_instrument_looks_different_at_its_tip():
    cells = {}
    for tool in vocabulary.TOOLS:
        picture, _ = drawing.draw(alone(tool, "Idle"), SMALL)
        cells[tool] = np.asarray(picture, float)[42 - 14 : 42 + 14, 56 - 14 : 56 + 14]
    for one, other in itertools.combinations(cells, 2):
        assert (np.abs(cells[one] - cells[other]).max(-1) > 40).mean() > 0.08, (one, other)


def test_a_scene_looks_the_same_at_every_size(even_scenes):
    for scene_ in even_scenes[:3]:
        large, large_boxes = drawing.draw(scene_, (640, 512))
        small, small_boxes = drawing.draw(scene_, (160, 128))
        assert np.allclose(np.array(large_boxes) / 4, small_boxes, atol=1)
        difference = np.asarray(large.reduce(4), float) - np.asarray(small, float)
        assert np.abs(difference).mean() < 8


def test_cues_cover_the_states_and_designs_the_instruments():
    assert set(shapes.DESIGNS) == set(scene.TOOL_STATES) == set(vocabulary.TOOLS)
    assert {state for states in scene.TOOL_STATES.values() for state in states} == set(vocabulary.STATES)


def test_drawing_imports_no_jax():
    code = "import sys; import surgery_r1_jax.synth; print('jax' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
