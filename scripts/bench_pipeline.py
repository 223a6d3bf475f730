#!/usr/bin/env python
"""Frames and questions a second: this pipeline against PyTorch's DataLoader with transformers' Qwen2.5-VL processor.

Both read the same 1280x1024 files with the same number of worker processes, keep nothing decoded, and make what a
training step needs. First their outputs are compared: pixel values to the last bit, and all token ids. Then, in turns:

    frames     one question a frame: both read each frame once
    questions  all questions of each frame, as many as in EndoVis-18-VQLA. Here a frame comes once with its questions;
               there, as trainers have it, each question is a conversation with its image

.venv/bin/python scripts/bench_pipeline.py --labels labels_train.txt
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from surgery_r1_jax import hf, images, labellist, options, pipeline, synth, tiny

SIZE, SEEN = (1280, 1024), (1120, 896)  # of the files, and as the model sees them
BATCH = 4


class ImageProcessor(Qwen2_5_VLProcessor):
    """transformers' processor without its video part, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token, self.video_processor = "<|image_pad|>", "<|video_pad|>", None
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Conversations(torch.utils.data.Dataset):
    """One conversation a question, its image read and processed each time."""

    def __init__(self, processor, rows):
        self.processor, self.rows = processor, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        path, messages = self.rows[number]
        text = self.processor.apply_chat_template(messages, tokenize=False)
        with Image.open(path) as file:
            return self.processor(text=[text], images=[file.convert("RGB")], return_tensors="pt")


def collate(items):
    """Token ids padded to the longest, pixels one after the other: what transformers' models take."""
    ids = [item["input_ids"][0] for item in items]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "pixel_values": torch.cat([item["pixel_values"] for item in items]),
        "image_grid_thw": torch.cat([item["image_grid_thw"] for item in items]),
    }


def main() -> int:
    """Compare, measure, print; 1 where outputs differ or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="list of labels (default: drawn ones)")
    parser.add_argument("--frames", type=int, default=48)
    parser.add_argument("--kind", choices=("png", "jpg"), default="png")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        frames = write_frames(Path(folder), args)
        model = tiny.write_folder(Path(folder) / "model", tiny.Sizes(size=SEEN, window_size=112))
        encoder = hf.encoder_of(model, hf.read_config(model))
        encoder = dataclasses.replace(encoder, pictures=images.Kept(0.0))
        tokenizer = AutoTokenizer.from_pretrained(model)
        seeing = Qwen2VLImageProcessorPil.from_pretrained(model)
        processor = ImageProcessor(seeing, tokenizer, chat_template=tokenizer.chat_template)
        print(f"transformers {transformers.__version__}, {type(seeing).__name__}: {fast()}; torch {torch.__version__}")
        if difference := compare(frames, encoder, processor):
            print(f"outputs differ: {difference}")
            return 1
        questions = sum(len(frame.records) for frame in frames)
        print(f"outputs equal; {len(frames)} {args.kind} files, {questions} questions, {args.workers} workers each")
        missed = False
        for what, bar in (("frames", 1.0), ("questions", 3.0)):
            chosen = frames
            if what == "frames":
                chosen = [dataclasses.replace(frame, records=frame.records[:1]) for frame in frames]
            rates = {"here": [], "there": []}
            for _ in range(args.repeats):
                rates["here"].append(ours(chosen, encoder, args.workers))
                rates["there"].append(theirs(chosen, encoder, processor, args.workers))
            here, there = (statistics.median(values) for values in rates.values())
            ratio = here / there
            missed |= ratio < bar
            print(f"{what:<10} a second: here {here:7.2f}, there {there:7.2f}, ratio {ratio:.2f} (bar {bar})")
    return missed


def write_frames(folder: Path, args):
    """Files with smooth colours and sensor noise, and the questions of as many frames spread over the list."""
    if args.labels:
        listed = labellist.read(args.labels)
        labelled = [listed[i] for i in np.linspace(0, len(listed) - 1, args.frames).astype(int)]
    else:
        synth.write(folder / "drawn", frames=args.frames, seed=0, size=(140, 112), max_tools=4, sequences=("seq_2",))
        labelled = pipeline.read(options.Data(root=str(folder / "drawn")))
    rng = np.random.default_rng(0)
    frames = []
    for number, frame in enumerate(labelled):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 10, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 3, (SIZE[1], SIZE[0], 3))
        path = folder / f"{number:04d}.{args.kind}"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
        frames.append(dataclasses.replace(frame, image=path, width=SIZE[0], height=SIZE[1]))
    return frames


def fast() -> str:
    """What is said of the processor on torchvision."""
    try:
        import torchvision

        return f"torchvision {torchvision.__version__} is here, its fast processor is not used"
    except ImportError:
        return "torchvision is not here, so neither is its fast processor"


def messages_of(encoder, record, completion: str) -> list[dict]:
    """A whole conversation as transformers' template takes it."""
    from surgery_r1_jax import answer

    return [
        {"role": "system", "content": encoder.system},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": answer.prompt(record.question)}]},
        {"role": "assistant", "content": completion},
    ]


def compare(frames, encoder, processor) -> str | None:
    """What differs in a frame with each of its questions."""
    frame = max(frames, key=lambda f: len(f.records))
    rows, grid = encoder.preprocessor.patches(images.load(frame.image))
    for record in frame.records:
        text = encoder.completion(frame, record, think=True)
        item = Conversations(processor, [(frame.image, messages_of(encoder, record, text))])[0]
        branch = encoder.branch(frame, record, think=True)
        own = encoder.prefix_ids([grid]) + branch.prompt + branch.completion
        if item["input_ids"][0].tolist()[: len(own)] != own:
            return f"token ids of {record.question!r}"
        if not np.array_equal(item["pixel_values"].numpy(), rows):
            return "pixel values"
    return None


def ours(frames, encoder, workers: int) -> float:
    """Questions a second of this pipeline (frames, where each has one)."""
    data = options.Data(root="", frames=BATCH, questions=9, workers=workers, threads=1, cache=0.0)
    stream = pipeline.training(frames, encoder, data, options.Targets(reasoning=0.5), seed=0)
    with stream.starting() as batches:
        return rate(batches, len(frames) // BATCH, lambda batch: segments(batch.branch_segment_BJT))


def segments(segment_BJT) -> int:
    """Branches in a batch."""
    return int(segment_BJT.max(-1).sum())


def theirs(frames, encoder, processor, workers: int) -> float:
    """The same of a DataLoader: as many batches of as many conversations as fit the same time."""
    rows = [
        (frame.image, messages_of(encoder, record, encoder.completion(frame, record, think=number % 2 == 0)))
        for frame in frames
        for number, record in enumerate(frame.records)
    ]
    loader = torch.utils.data.DataLoader(
        Conversations(processor, rows), BATCH, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True
    )
    return rate(iter(loader), min(len(loader), len(frames) // BATCH), lambda batch: len(batch["input_ids"]))


def rate(batches, count: int, questions) -> float:
    """Questions a second between the first batch and the last, so that starting workers does not count."""
    next(batches)
    since, done = time.perf_counter(), 0
    for batch in itertools.islice(batches, count - 1):
        done += questions(batch)
    return done / (time.perf_counter() - since)


if __name__ == "__main__":
    sys.exit(main())
