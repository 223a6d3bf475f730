import json
from pathlib import Path

import numpy as np
import pytest
import randomised
import toy
import transformers
from PIL import Image

from surgery_r1_jax import answer, boxes, cli, conversations, hf, images, records, tiny
from surgery_r1_jax.errors import InputError

FAMILIES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}  # with their patch sizes
LIMITS = [(4 * 28 * 28, 8 * 28 * 28), (64 * 28 * 28, 1000 * 28 * 28)]  # the frames are made smaller, and larger


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toy.write_data(tmp_path_factory.mktemp("conversations") / "data", frames=4)


def model_folder(folder, family="qwen2_5_vl", limits=LIMITS[0]):
    """A folder of the family without weights."""
    tiny.write_folder(folder, toy.SIZES)
    ours = json.loads((folder / "config.json").read_text())
    whole = randomised.configuration(family, tied=True)
    whole.text_config.vocab_size = ours["text_config"]["vocab_size"]
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(whole, name, ours[name])
    whole.save_pretrained(folder)
    images.Preprocessor(FAMILIES[family], 2, 2, *limits, tiny.MEAN, tiny.STD).to_folder(folder)
    return folder


def export(source, out, model, form):
    assert cli.main(["data", "export", str(source), str(out), "--model", str(model), "--format", form]) == 0
    return out


def load(out):
    """Every row as another trainer's data loader gives it, by split."""
    datasets = pytest.importorskip("datasets", reason="what is exported is loaded with Hugging Face datasets")
    datasets.disable_progress_bars()
    files = {file.stem: str(file) for file in out.glob("*.jsonl")}
    return datasets.load_dataset("json", data_files=files, cache_dir=str(out / "cache"))


def texts(row):
    """System text, question, answer and image of a row of either form."""
    if "messages" in row:
        turns = {turn["role"]: turn["content"] for turn in row["messages"]}
        assert [part["type"] for part in turns["user"]] == ["image", "text"]
        return turns["system"][0]["text"], turns["user"][1]["text"], turns["assistant"][0]["text"], *row["images"]
    asked, given = row["conversations"]
    assert (asked["from"], given["from"]) == ("human", "gpt") and asked["value"].startswith("<image>")
    return row["system"], asked["value"].removeprefix("<image>"), given["value"], *row["images"]


def told(reply):
    """Answer and box, read with nothing of ours."""
    found = json.loads(reply.partition("<answer>")[2].removesuffix("</answer>"))
    return found.get("answer"), found.get("bbox_2d")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("limits", "form"), list(zip(LIMITS, conversations.FORMS, strict=True)), ids=str)
def test_every_box_comes_back_within_half_a_quantum(source, tmp_path, family, limits, form):
    model = model_folder(tmp_path / "model", family, limits)
    out, frames = export(source, tmp_path / "out", model, form), records.read(source)
    splits = load(out)
    assert set(splits) == {"train", "dev"}
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    system = hf.encoder_of(model, hf.read_config(model)).system
    misread = []
    for split, rows in splits.items():
        wanted = [(frame, record) for frame in records.split(frames, split) for record in frame.records]
        assert len(rows) == len(wanted)
        for row, (frame, record) in zip(rows, wanted, strict=True):
            said, question, reply, image = texts(row)
            name, box = told(reply)
            assert (said, question, name) == (system, record.question, record.answer)
            with Image.open(out / image) as picture:
                size = picture.size
                _, height, width = processor(picture)["image_grid_thw"][0]
            assert (width * FAMILIES[family], height * FAMILIES[family]) == size  # nobody resizes it again
            assert size != (frame.width, frame.height)
            steps, other = ([*size] * 2, [1000] * 4) if family == "qwen2_5_vl" else ([1000] * 4, [*size] * 2)
            assert np.abs(np.array(box) / steps - record.box).max() <= 0.5 / min(steps) + 1e-9
            misread.append(boxes.iou(np.array(box) / other, np.array(record.box), np))
    assert np.mean(misread) < 0.9  # in the other units they would not


def test_a_row_through_the_chat_template_is_what_our_model_is_trained_on(source, tmp_path):
    model = model_folder(tmp_path / "model")
    rows = [json.loads(line) for line in (export(source, tmp_path / "out", model, "messages") / "dev.jsonl").open()]
    encoder = hf.encoder_of(model, hf.read_config(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    asked = [(frame, record) for frame in records.split(records.read(source), "dev") for record in frame.records]
    for row, (frame, record) in zip(rows, asked, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        branch = encoder.branch(frame, record, think=True)
        ours = [*encoder.chat.prefix_ids(encoder.system, [1]), *branch.prompt, *branch.completion]
        assert tokenizer.encode(text.rstrip("\n"), add_special_tokens=False) == ours


def own(root, *rows):
    root.mkdir()
    Image.new("RGB", (64, 48), (9, 90, 9)).save(root / "a.png")
    base = {"image": "a.png", "question": "Is it open?", "answer": "open", "bbox": [1, 2, 33, 44], "split": "train"}
    (root / "records.jsonl").write_text("".join(json.dumps(base | row) + "\n" for row in rows))
    (root / "data.json").write_text('{"boxes": "pixel"}')
    return root


def test_own_records_are_written_as_they_want_it(tmp_path):
    rows = [{"kind": "vqa_direct"}, {"kind": "grounding_cot", "reasoning": "It gapes."}, {"answer": "shut"}]
    source, model = own(tmp_path / "own", *rows), model_folder(tmp_path / "model")
    out = export(source, tmp_path / "out", model, "sharegpt")
    found = [texts(json.loads(line)) for line in (out / "train.jsonl").open()]
    assert [question for _, question, _, _ in found] == [answer.prompt("Is it open?", want) for want in (0, 1, 2)]
    assert [reply.startswith("<think>It gapes.</think>") for _, _, reply, _ in found] == [False, True, False]
    assert [told(reply)[0] for _, _, reply, _ in found] == ["open", None, "shut"]
    assert [told(reply)[1] is None for _, _, reply, _ in found] == [True, False, False]
    info = json.loads((out / "dataset_info.json").read_text())
    assert info["out_train"]["file_name"] == "train.jsonl" and (out / "images/a.png").is_file()
    about = json.loads((out / "export.json").read_text())
    assert (about["classes"], about["records"], about["max_pixels"]) == (["open", "shut"], {"train": 3}, LIMITS[0][1])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Is <image> open?"}, "records.jsonl:1: its text holds <image>"),
        ({"reasoning": "As in <video>."}, "records.jsonl:1: its text holds <video>"),
        ({"reasoning": "</think>"}, "records.jsonl:1: the reasoning '</think>' holds the tag"),
    ],
)
def test_what_trainers_would_misread_is_refused_and_nothing_is_left(tmp_path, row, reason):
    source, model = own(tmp_path / "own", row), model_folder(tmp_path / "model")
    with pytest.raises(InputError, match=reason):
        conversations.run(source, tmp_path / "out", model=model)
    assert not list(Path(tmp_path).glob("out*"))


def test_a_frame_without_a_final_size_stays_as_it_is(tmp_path):
    source, model = own(tmp_path / "own", {"bbox": [0, 0, 15, 700]}), model_folder(tmp_path / "model")
    Image.new("RGB", (15, 1400)).save(source / "a.png")
    out = export(source, tmp_path / "out", model, "messages")
    with Image.open(out / "images/a.png") as picture:
        assert picture.size == (15, 1400)
        _, height, width = transformers.AutoImageProcessor.from_pretrained(model)(picture)["image_grid_thw"][0]
    _, _, reply, _ = texts(json.loads((out / "train.jsonl").read_text()))
    assert told(reply)[1] == [0, 0, width * 14, height * 7]  # what a trainer with the same limits makes of it


def test_a_folder_that_holds_files_is_refused(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not an empty folder"):
        conversations.run(tmp_path / "own", tmp_path, model=tmp_path / "model")
