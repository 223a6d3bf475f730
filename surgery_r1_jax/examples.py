"""From a frame and its questions to one example of a `FrameBatch`.

    prefix  (system, instruction, image)   one a frame
       |-- lane 0: branch 1 | branch 2 | padding
       |-- lane 1: branch 1 | padding

For training a lane may hold several short branches, told apart by their segment number; for rollout a lane holds
one question, right-aligned, so that all lanes go on at the same slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

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
    classes: tuple[str, ...] = vocabulary.CLASSES  # the answers there are
    blank: bool = False  # show a grey image instead of the frame: what does the model know without looking?
    pictures: images.Kept = field(default_factory=images.Kept, repr=False, compare=False)

    @property
    def system(self) -> str:
        """The instruction at the head of every prefix."""
        return answer.instruction(self.codec.units)

    def patch_grid(self, frame: Frame) -> grid.Grid:
        """Patch rows and columns of a frame as the model sees it."""
        width, height = self.resized(frame)
        return height // self.preprocessor.patch_size, width // self.preprocessor.patch_size

    def prefix_ids(self, grids: Sequence[grid.Grid]) -> list[int]:
        """Token ids of the prefix with images of these grids."""
        return self.chat.prefix_ids(self.system, [h * w // self.preprocessor.merge_size**2 for h, w in grids])

    def branch(self, frame: Frame, record: Record, *, box: Box | None = None, think: bool, want: int = BOTH) -> Branch:
        """A question with its answer, as token ids; the arguments are those of `completion`."""
        text = self.completion(frame, record, box=box, think=think, want=want)
        return Branch(self.prompt(record, want), self.chat.completion_ids(text))

    def completion(self, frame: Frame, record: Record, *, box: Box | None = None, think: bool, want: int = BOTH) -> str:
        """The text of an answer. `box` replaces the true one; `think` puts the reasoning in front, if there is any.

        Raises: InputError naming the record whose reasoning cannot be written.
        """
        shown = self.codec.encode(box or record.box, *self.resized(frame))
        traced = reasoning.write(frame, record) if record.think is None else record.think
        try:
            return answer.render(
                answer=None if want == BOX else record.answer,
                box=None if want == ANSWER else shown,
                think=self._in_units(traced, frame, record, shown) if think and traced else None,
            )
        except errors.InputError as error:
            raise errors.InputError(f"{record.source}: {error}") from None

    def _in_units(self, text: str, frame: Frame, record: Record, shown: Sequence[int]) -> str:
        """Reasoning with its boxes in the units of the answer, the record's own box as the answer shows it."""
        resized, size = self.resized(frame), (frame.width, frame.height) * 2
        own = self.codec.encode(record.box, *resized)

        def encode(pixels: Box) -> Sequence[int]:
            units = self.codec.encode([edge / side for edge, side in zip(pixels, size, strict=True)], *resized)
            return shown if units == own else units

        return answer.map_boxes(text, encode)

    def resized(self, frame: Frame) -> tuple[int, int]:
        """Width and height of a frame as the model sees it."""
        return self.preprocessor.resized(frame.width, frame.height)

    def prompt(self, record: Record, want: int = BOTH) -> list[int]:
        """Token ids of a question alone, up to where the model answers."""
        return self.chat.prompt_ids(answer.prompt(record.question, want))

    def training(
        self, frame: Frame, branches: Sequence[Branch], shape: Shape, picture: Image.Image | None = None
    ) -> FrameBatch:
        """An example for teacher forcing: branches packed into lanes, completion tokens scored.

        `picture` is shown in place of the frame's own.

        Raises: InputError naming the frame where its branches do not fit into the shape.
        """
        _fit(frame.id, "tokens of a question with its answer", max(map(len, branches), default=0), shape.lane_tokens)
        lanes = pack([len(branch) for branch in branches], shape.lane_tokens)
        _fit(frame.id, "lanes", len(lanes), shape.lanes)
        _fit(frame.id, "scored tokens", sum(len(branch.completion) for branch in branches), shape.scored)
        prefix, next_pos = self._prefix(frame, shape, picture)
        ids, pos, segment = self._empty_lanes(shape)
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
        return FrameBatch(
            *prefix,
            branch_ids_BJT=ids,
            branch_pos_BJT=pos,
            branch_segment_BJT=segment,
            score_slot_BL=_padded(slots, shape.scored),
            score_target_BL=_padded(targets, shape.scored),
            score_weight_BL=_padded(np.ones(len(targets), np.float32), shape.scored),
        )

    def prompts(
        self, frame: Frame, number: int, chosen: Sequence[int], shape: Shape, picture: Image.Image | None = None
    ) -> tuple[FrameBatch, Gold]:
        """An example for rollout: the chosen records' questions, one a lane, right-aligned, and their gold.

        `picture` is shown in place of the frame's own. Raises: InputError naming the frame where its questions do not
        fit into the shape.
        """
        questions = [self.prompt(frame.records[index], wanted(frame.records[index])) for index in chosen]
        _fit(frame.id, "questions", len(questions), shape.lanes)
        _fit(frame.id, "tokens of a question", max(map(len, questions), default=0), shape.lane_tokens)
        prefix, next_pos = self._prefix(frame, shape, picture)
        ids, pos, segment = self._empty_lanes(shape)
        gold = batch.padding_gold(shape.lanes)
        for q, (index, tokens) in enumerate(zip(chosen, questions, strict=True)):
            record = frame.records[index]
            here = slice(shape.lane_tokens - len(tokens), None)
            ids[q, here], segment[q, here] = tokens, 1
            pos[q, here] = next_pos + np.arange(len(tokens))
            gold.answer_BQ[q] = vocabulary.class_index(record.answer, self.classes)
            gold.box_BQ4[q] = record.box
            gold.kind_BQ[q] = record.kind
            gold.want_BQ[q] = wanted(record)
            gold.record_BQ[q] = index
            gold.valid_BQ[q] = True
        gold.resized_B2[:] = self.resized(frame)
        if frame.organ_box is not None:
            gold.organ_box_B4[:] = frame.organ_box
        gold = gold._replace(frame_B=np.int32(number), organ_ok_B=np.bool_(frame.organ_box is not None))
        nothing = np.zeros(0, np.int32)
        return FrameBatch(*prefix, ids, pos, segment, nothing, nothing, np.zeros(0, np.float32)), gold

    def prefix(
        self, name: str, pictures: Sequence[tuple[np.ndarray, grid.Grid]], shape: Shape
    ) -> tuple[list[np.ndarray], int]:
        """The first seven fields of an example, for any number of images, and the branches' first position.

        Raises: InputError with the name where they do not fit into the shape.
        """
        grids = [g for _, g in pictures]
        patches = np.concatenate([p for p, _ in pictures])
        merge = self.preprocessor.merge_size
        _fit(name, "windows", grid.count_windows(grids, self.window_side, merge), shape.windows)
        layout = grid.arrange(grids, side=self.window_side, merge=merge, windows=shape.windows)
        filled_WS = layout.source_WS >= 0
        patches_WSC = np.zeros((*filled_WS.shape, patches.shape[-1]), np.float32)
        patches_WSC[filled_WS] = patches[layout.source_WS[filled_WS]]
        ids = np.asarray(self.prefix_ids(grids), np.int32)
        _fit(name, "prefix tokens", ids.size, shape.prefix)
        unit = np.full(ids.size, -1, np.int32)
        unit[ids == self.chat.image_id] = layout.unit_of_token
        pos_3P, next_pos = grid.rope_positions(ids, self.chat.image_id, grids, merge)
        fields = [
            patches_WSC,
            layout.hw_WS2,
            layout.image_WS,
            _padded(ids, shape.prefix, self.chat.pad_id),
            _padded(unit, shape.prefix, -1),
            _padded(pos_3P, shape.prefix),
            _padded(np.ones(ids.size, bool), shape.prefix),
        ]
        return fields, next_pos

    def picture(self, frame: Frame) -> Image.Image:
        """What the model is shown, in its final size; kept while there is room, so that each is decoded once."""
        if self.blank:
            return images.blank(frame.width, frame.height)
        if (picture := self.pictures.get(frame.image)) is None:
            picture = images.load(frame.image)
            size = self.preprocessor.resized(*picture.size)
            # What has this size already is not resized again, unless it is so narrow that it has no final size.
            if self.preprocessor.resized(*size) == size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
                self.pictures.add(frame.image, picture)
        return picture

    def _prefix(self, frame: Frame, shape: Shape, picture: Image.Image | None = None) -> tuple[list[np.ndarray], int]:
        return self.prefix(frame.id, [self.preprocessor.patches(picture or self.picture(frame))], shape)

    def _empty_lanes(self, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, positions and segments [J, T] without any branch."""
        ids, pos, segment = (np.zeros((shape.lanes, shape.lane_tokens), np.int32) for _ in range(3))
        ids[:] = self.chat.pad_id
        return ids, pos, segment


def wanted(record: Record) -> int:
    """What the prompt of a question asks for: what its record says, or else both."""
    return BOTH if record.want is None else record.want


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


def _fit(name: str, what: str, needed: int, room: int) -> None:
    if needed > room:
        raise errors.InputError(f"{name}: {needed} {what} do not fit in {room}")


def _padded(array, length: int, value=0) -> np.ndarray:
    """The array with its last axis filled up to a length; lists become int32."""
    array = np.asarray(array, None if isinstance(array, np.ndarray) else np.int32)
    full = np.full((*array.shape[:-1], length), value, array.dtype)
    full[..., : array.shape[-1]] = array
    return full
