import json
import subprocess
import sys

import numpy as np
import pytest
import toy
from PIL import Image

from surgery_r1_jax import images, records, vocabulary

tfds = pytest.importorskip("tensorflow_datasets")

from surgery_r1_jax import surgery_vqla  # noqa: E402

# Runs where TensorFlow cannot be imported, whether it is installed or not.
PREPARE = """
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = lambda name, *more: None if name.split(".")[0] == "tensorflow" else find(name, *more)
try:
    import tensorflow
except ModuleNotFoundError:
    print("not importable")
import tensorflow_datasets as tfds
import surgery_r1_jax.surgery_vqla
name, data_dir, manual_dir = sys.argv[1:]
builder = tfds.builder(f"surgery_vqla/{name}", data_dir=data_dir)
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
rows = {split: [row["id"].decode() for row in builder.as_data_source(split=split)] for split in builder.info.splits}
assert "tensorflow" not in sys.modules
print(rows)
"""


def prepare(name, tmp_path, manual):
    builder = tfds.builder(f"surgery_vqla/{name}", data_dir=tmp_path / "prepared")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    return builder


def test_it_prepares_and_reads_where_tensorflow_cannot_be_imported(tmp_path):
    manual = tmp_path / "manual"
    toy.write_data(manual / "EndoVis-18-VQLA", frames=4, sequences=("seq_1", "seq_2", "seq_6"))
    call = [sys.executable, "-c", PREPARE, "endovis18", tmp_path / "prepared", manual]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = records.read(manual / "EndoVis-18-VQLA")
    wanted = {split: {f.id for f in records.split(frames, split)} for split in ("train", "dev", "val")}
    assert done.stdout.startswith("not importable\n")
    told = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert {split: set(ids) for split, ids in told.items()} == wanted
    shards = [
        p.name for p in (tmp_path / "prepared/surgery_vqla/endovis18/1.0.0").iterdir() if "array_record" in p.name
    ]
    assert len(shards) == 3
    again = prepare("endovis18", tmp_path, manual)  # there already
    assert again.info.metadata["classes"] == list(vocabulary.CLASSES)
    assert "Bai" in again.info.citation and "EndoVis challenges" in (again.info.redistribution_info.license or "")


def own_data(root):
    """Two frames of one's own: a plain JPEG, and a PNG with transparency."""
    root.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(root / "a.jpg")
    Image.fromarray(rng.integers(0, 255, (48, 64, 4), np.uint8)).save(root / "b.png")
    rows = [
        {"image": "a.jpg", "answer": "open", "bbox": [1, 2, 33, 44], "split": "train", "reasoning": "It gapes."},
        {"image": "a.jpg", "answer": "shut", "bbox": [0, 0, 64, 48], "split": "train", "want": "box"},
        {"image": "b.png", "answer": "shut", "bbox": [5, 6, 7, 8], "split": "dev"},
    ]
    lines = [json.dumps({"question": f"Question {i}?", **row}) for i, row in enumerate(rows)]
    (root / "records.jsonl").write_text("\n".join(lines))
    (root / "data.json").write_text('{"boxes": "pixel"}')
    return root


def test_what_is_prepared_is_what_was_read(tmp_path):
    root = own_data(tmp_path / "own")
    builder = prepare("custom", tmp_path, root)
    assert set(builder.info.splits) == {"dev", "train"}
    assert builder.info.metadata["classes"] == ["open", "shut"]
    for split in ("train", "dev"):
        (frame,) = records.split(records.read(root), split)
        (row,) = builder.as_data_source(split=split)
        (raw,) = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        assert (row["id"].decode(), row["sequence"].decode()) == (frame.id, frame.sequence)
        assert (raw["image"] == frame.image.read_bytes()) == (frame.id == "a.jpg")
        np.testing.assert_array_equal(np.asarray(row["image"], int), images.load(frame.image), strict=False)
        told = row["records"]
        for i, record in enumerate(frame.records):
            assert told["question"][i].decode() == record.question and told["answer"][i].decode() == record.answer
            ymin, xmin, ymax, xmax = told["bbox"][i]
            assert (xmin, ymin, xmax, ymax) == pytest.approx(record.box, abs=1e-6)
            assert told["reasoning"][i].decode() == (record.think or "")
            assert (told["kind"][i], told["want"][i]) == (record.kind, 3 if record.want is None else record.want)


def test_the_extended_set_has_26_answers_and_keeps_endovis17_apart(tmp_path):
    for home, stem in (("EndoVis-18-VQLA-Extended/seq_2", "frame000"), ("EndoVis-17-VQLA-Extended", "seq1_frame000")):
        for part in ("left_frames", "vqla/label"):
            (tmp_path / home / part).mkdir(parents=True)
        Image.new("RGB", (32, 24), (len(stem), 0, 0)).save(tmp_path / home / "left_frames" / f"{stem}.png")
        (tmp_path / home / "vqla/label" / f"{stem}.txt").write_text(
            "What is the tool in the left top?|suction|1,1,9,9\n"
        )
    builder = prepare("extended", tmp_path, tmp_path)
    assert set(builder.info.splits) == {"external", "train"}
    assert builder.info.metadata["classes"] == list(vocabulary.EXTENDED_CLASSES)
    (row,) = builder.as_data_source(split="external")
    assert row["records"]["answer"] == [b"suction"] and row["records"]["kind"] == [vocabulary.TOOL]


def test_a_manual_folder_without_the_set_is_told(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(surgery_vqla.InputError, match="holds no EndoVis-17-VQLA; lay it there"):
        prepare("endovis17", tmp_path, tmp_path / "other")
