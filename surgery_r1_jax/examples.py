"""From a frame and its questions to one example of a `FrameBatch`.

    prefix  (system, instruction, image)   one a frame
       |-- lane 0: branch 1 | branch 2 | padding
       |-- lane 1: branch 1 | padding

For training a lane may hold several short branches, told apart by their segment number; for rollout a lane holds
one question, right-aligned, so that all lanes go on at the same slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from surgery_r1_jax import answer, batch, errors, grid, images, reasoning, vocabulary
from surgery_r1_jax.batch import ANSWER, BOTH, BOX, FrameBatch, Gold, Shape
from surgery_r1_jax.chat import Chat
from surgery_r1_jax.codec import BoxCodec
from surgery_r1_jax.records import Box, Frame, Record


class Branch(NamedTuple):
    """Token ids of one question and, for training, its answer."""

    prompt: list[int]
    completion: list[int]

    def __len__(self):
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Encoder:
    """Everything that turns a frame into token ids and patches; one for a run."""

    chat: Chat
    preprocessor: images.Preprocessor
    codec: BoxCodec
    window_side: int  # merged units along a window's side
    system: str = answer.INSTRUCTION
    blank: bool = False  # show a grey image instead of the frame: what does the model know without looking?

    @property
    def slots(self) -> int:
        """Patches in a window."""
        return (self.window_side * self.preprocessor.merge_size) ** 2

    def patch_grid(self, frame: Frame) -> grid.Grid:
        """Patch rows and columns of a frame as the model sees it."""
        width, height = self.preprocessor.resized(frame.width, frame.height)
        return height // self.preprocessor.patch_size, width // self.preprocessor.patch_size

    def prefix_ids(self, grids: Sequence[grid.Grid]) -> list[int]:
        """Token ids of the prefix with images of these grids."""
        return self.chat.prefix_ids(self.system, [h * w // self.preprocessor.merge_size**2 for h, w in grids])

    def branch(self, frame: Frame, record: Record, *, box: Box | None = None, think: bool, want: int = BOTH) -> Branch:
        """A question with its answer. `box` replaces the true one; `think` puts the reasoning in front."""
        resized = self.preprocessor.resized(frame.width, frame.height)
        text = answer.render(
            answer=None if want == BOX else record.answer,
            box=None if want == ANSWER else self.codec.encode(box or record.box, *resized),
            think=(record.think or reasoning.write(frame, record)) if think else None,
        )
        return Branch(self.prompt(record, want), self.chat.completion_ids(text))

    def prompt(self, record: Record, want: int = BOTH) -> list[int]:
        """Token ids of a question alone, up to where the model answers."""
        return self.chat.prompt_ids(answer.prompt(record.question, want))

    def training(self, frame: Frame, branches: Sequence[Branch], shape: Shape) -> FrameBatch:
        """An example for teacher forcing: branches packed into lanes, completion tokens scored."""
        lanes = pack([len(b) for b in branches], shape.lane_tokens)
        if len(lanes) > shape.lanes:
            raise errors.InputError(f"{frame.id}: {len(branches)} branches need {len(lanes)} lanes of {shape.lanes}")
        prefix, next_pos = self._prefix(frame, shape)
        ids, pos, segment = (np.zeros((shape.lanes, shape.lane_tokens), np.int32) for _ in range(3))
        ids[:] = self.chat.pad_id
        slots, targets = [], []
        for j, members in enumerate(lanes):
            at = 0
            for number, index in enumerate(members, start=1):
                branch = branches[index]
                here = slice(at, at + len(branch))
                ids[j, here] = branch.prompt + branch.completion
                pos[j, here] = next_pos + np.arange(len(branch))
                segment[j, here] = number
                first = j * shape.lane_tokens + at + len(branch.prompt) - 1
                slots.extend(range(first, first + len(branch.completion)))
                targets.extend(branch.completion)
                at += len(branch)
        pad = [(0, shape.scored - len(slots))]
        return FrameBatch(
            *prefix,
            branch_ids_BJT=ids,
            branch_pos_BJT=pos,
            branch_segment_BJT=segment,
            score_slot_BL=np.pad(np.asarray(slots, np.int32), pad),
            score_target_BL=np.pad(np.asarray(targets, np.int32), pad),
            score_weight_BL=np.pad(np.ones(len(slots), np.float32), pad),
        )

    def prompts(self, frame: Frame, number: int, chosen: Sequence[int], shape: Shape) -> tuple[FrameBatch, Gold]:
        """An example for rollout: the chosen records' questions, one a lane, right-aligned, and their gold."""
        prefix, next_pos = self._prefix(frame, shape)
        ids, pos, segment = (np.zeros((shape.lanes, shape.lane_tokens), np.int32) for _ in range(3))
        ids[:] = self.chat.pad_id
        gold = batch.padding_gold(shape.lanes)
        for q, index in enumerate(chosen):
            record = frame.records[index]
            tokens = self.prompt(record)
            here = slice(shape.lane_tokens - len(tokens), None)
            ids[q, here], segment[q, here] = tokens, 1
            pos[q, here] = next_pos + np.arange(len(tokens))
            gold.answer_BQ[q] = vocabulary.class_index(record.answer)
            gold.box_BQ4[q] = record.box
            gold.kind_BQ[q] = record.kind
            gold.record_BQ[q] = index
            gold.valid_BQ[q] = True
        gold.resized_B2[:] = self.preprocessor.resized(frame.width, frame.height)
        if frame.organ_box is not None:
            gold.organ_box_B4[:] = frame.organ_box
        gold = gold._replace(frame_B=np.int32(number), organ_ok_B=np.bool_(frame.organ_box is not None))
        nothing = np.zeros(0, np.int32)
        return FrameBatch(*prefix, ids, pos, segment, nothing, nothing, np.zeros(0, np.float32)), gold

    def _prefix(self, frame: Frame, shape: Shape) -> tuple[list[np.ndarray], int]:
        if self.blank:
            image = images.blank(frame.width, frame.height)
        else:
            image = images.load(frame.image)
        patches, patch_grid = self.preprocessor.patches(image)
        return self.prefix([(patches, patch_grid)], shape)

    def prefix(self, pictures: Sequence[tuple[np.ndarray, grid.Grid]], shape: Shape) -> tuple[list[np.ndarray], int]:
        """The first seven fields of an example, for any number of images, and the branches' first position."""
        grids = [g for _, g in pictures]
        patches = np.concatenate([p for p, _ in pictures])
        merge = self.preprocessor.merge_size
        layout = grid.arrange(grids, side=self.window_side, merge=merge, windows=shape.windows)
        source = layout.source_WS[..., None]
        patches_WSC = np.where(source >= 0, patches[np.maximum(layout.source_WS, 0)], np.float32(0))
        ids = np.asarray(self.prefix_ids(grids), np.int32)
        pad = shape.prefix - ids.size
        if pad < 0:
            raise errors.InputError(f"a prefix of {ids.size} tokens does not fit in {shape.prefix}")
        unit = np.full(ids.size, -1, np.int32)
        unit[ids == self.chat.image_id] = layout.unit_of_token
        pos_3P, next_pos = grid.rope_positions(ids, self.chat.image_id, grids, merge)
        fields = [
            patches_WSC,
            layout.hw_WS2,
            layout.image_WS,
            np.pad(ids, (0, pad), constant_values=self.chat.pad_id),
            np.pad(unit, (0, pad), constant_values=-1),
            np.pad(pos_3P, ((0, 0), (0, pad))),
            np.pad(np.ones(ids.size, bool), (0, pad)),
        ]
        return fields, next_pos


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of branches for each lane: longest first, each into the first lane with room."""
    lanes: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise errors.InputError(f"a branch of {lengths[index]} tokens does not fit in a lane of {capacity}")
        lane = next((j for j, free in enumerate(room) if free >= lengths[index]), None)
        if lane is None:
            lane = len(lanes)
            lanes.append([])
            room.append(capacity)
        lanes[lane].append(index)
        room[lane] -= lengths[index]
    return lanes
