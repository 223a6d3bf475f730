"""Texts to token ids: a checkpoint's tokenizer and chat template, cut where the prefix ends and the branches begin.

    prefix       <|im_start|>system\\nSYSTEM<|im_end|>\\n<|im_start|>user\\n<|vision_start|><|image_pad|><|vision_end|>
    prompt       QUESTION<|im_end|>\\n<|im_start|>assistant\\n
    completion   ANSWER<|im_end|>

Put together they are the ids of the template applied to the whole conversation. The constants are read off the
folder's own template, so that another member of the family works if its template has this shape.

Texts are data. They are stripped, lone surrogates become U+FFFD, and what spells a control token is encoded as plain
text: no system text, question or completion can end a turn, open one or bring an image. Stripping also makes the cuts
exact: a constant ends in a line feed or a control token, and no token spans that and a character which is not white.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from surgery_r1_jax import files
from surgery_r1_jax.errors import InputError, one_line

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")  # the first, or the other two
_CACHED_TEXTS = 1 << 18  # the short texts of a data set fit; beyond that they are encoded anew

# What stands for the texts while a template is read. Some templates rewrite reasoning: the answer has some.
_SYSTEM, _QUESTION, _ANSWER = "SYSTEMTEXT", "QUESTIONTEXT", "<think>THINKTEXT</think>ANSWERTEXT"


@dataclass(frozen=True)
class Chat:
    """The words of a checkpoint: ids of the template's constants, and the way from texts to ids and back.

    `vocab_size` counts the tokenizer's ids; the model's embedding may have more rows.
    """

    tokenizer: tokenizers.Tokenizer  # of data: control tokens in a text are plain text to it
    head: list[int]  # before the system text
    turn: list[int]  # from there to the images
    vision: list[int]  # start, one image unit, end
    reply: list[int]  # from the question to the completion
    stop_id: int
    pad_id: int
    control_ids: frozenset[int]
    vocab_size: int
    _cache: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Chat":
        """Read tokenizer and chat template of a Hugging Face folder; nothing is fetched and no code of it is run.

        Raises: InputError naming the folder where either is missing or not of the family's shape.
        """
        folder = Path(folder)
        loaded = _load(folder)
        tokenizer = loaded.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        control = _control_tokens(tokenizer)
        try:
            constants = _constants(functools.partial(_render, loaded, _template(folder, loaded)), control)
        except Exception as error:  # a template can fail in any way
            raise InputError(
                f"{folder}: cannot use its chat template ({one_line(error)}); take the one of a Qwen2.5-VL checkpoint"
            ) from error
        if loaded.pad_token_id is None:
            raise InputError(f"{folder}: tokenizer_config.json names no pad_token; add one")
        ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in constants)
        head, turn, vision, reply, (stop_id,) = ids
        # The constants are known: from here on the tokenizer reads data only.
        tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in control])
        tokenizer.encode_special_tokens = True
        return cls(
            tokenizer=tokenizer,
            head=head,
            turn=turn,
            vision=vision,
            reply=reply,
            stop_id=stop_id,
            pad_id=loaded.pad_token_id,
            control_ids=frozenset(control.values()),
            vocab_size=1 + max(tokenizer.get_vocab().values()),
        )

    def __setstate__(self, state: dict) -> None:
        """Come back from a pickle (worker processes) with control tokens in data still read as plain text."""
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    @property
    def image_id(self) -> int:
        """The id that stands for one merged image unit."""
        return self.vision[1]

    def prefix_ids(self, system: str, image_tokens: Sequence[int]) -> list[int]:
        """From the start to the end of the last image; `image_tokens` has each image's number of merged units."""
        start, unit, end = self.vision
        images = [id for units in image_tokens for id in (start, *[unit] * units, end)]
        return [*self.head, *self._ids(system), *self.turn, *images]

    def prompt_ids(self, question: str) -> list[int]:
        """From after the images to where the completion begins."""
        return [*self._ids(question), *self.reply]

    def completion_ids(self, text: str) -> list[int]:
        """The completion and the stop token."""
        return [*self._ids(text), self.stop_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of sampled ids up to the stop token, or all of it where that is missing."""
        ids = [int(id) for id in ids]
        end = ids.index(self.stop_id) if self.stop_id in ids else len(ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=False)

    def allowed(self, vocab_rows: int) -> np.ndarray:
        """bool [V]: the ids that may be sampled, which are the stop token and all that is not control or padding."""
        allowed_V = np.zeros(self._rows(vocab_rows), bool)
        allowed_V[list(self.tokenizer.get_vocab().values())] = True
        allowed_V[list(self.control_ids)] = False
        allowed_V[self.stop_id] = True
        return allowed_V

    def number_values(self, vocab_rows: int) -> np.ndarray:
        """int32 [V]: the value of tokens that are a whole number of 0..9999, -1 for all others."""
        values_V = np.full(self._rows(vocab_rows), -1, np.int32)
        for token, id in self.tokenizer.get_vocab().items():
            if len(token) <= 4 and token.isascii() and token.isdigit() and token == str(int(token)):
                values_V[id] = int(token)
        return values_V

    def _rows(self, vocab_rows: int) -> int:
        if vocab_rows < self.vocab_size:
            raise InputError(
                f"the model has {vocab_rows} vocabulary rows and the tokenizer {self.vocab_size} ids; "
                "take tokenizer and config.json from one checkpoint"
            )
        return vocab_rows

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"a {type(text).__name__} where a text must be; images belong to the prefix, by number")
        if (ids := self._cache.get(text)) is None:
            clean = text.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self.tokenizer.encode(clean, add_special_tokens=False).ids
            if len(self._cache) < _CACHED_TEXTS:
                self._cache[text] = ids
        return ids


def _load(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    if not folder.is_dir():  # transformers would take it for the name of a repository
        raise InputError(f"{folder}: no such folder; give the folder of a Qwen2.5-VL checkpoint")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            files.check_fetched(folder / name)
    if not (folder / "tokenizer.json").is_file() and not all((folder / name).is_file() for name in TOKENIZER_FILES[1:]):
        # transformers would make do with the control tokens of tokenizer_config.json
        raise InputError(f"{folder}: no usable tokenizer (no tokenizer.json); copy the checkpoint's own files")
    import transformers  # seconds: a mistake in a configuration is answered before

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds on a bad folder
        why = f"no usable tokenizer ({one_line(error)})"
        raise InputError(f"{folder}: {why}; copy the checkpoint's own files") from error


def _control_tokens(tokenizer: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of the tokens that build conversations. Qwen does not mark `<|fim_prefix|>` and its like as special."""
    return {
        token.content: id
        for id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
    }


def _template(folder: Path, loaded: "transformers.PreTrainedTokenizerBase") -> str:
    """The template of the folder; the processor's, in a file of its own, goes before the tokenizer's."""
    file = folder / "chat_template.json"
    if file.exists() and not (folder / "chat_template.jinja").exists():
        return json.loads(file.read_text("utf-8"))["chat_template"]
    template = loaded.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise ValueError("there is none")
    return template


def _render(loaded, template: str, images: int, answered: bool) -> str:
    """A conversation with stand-ins for its texts, up to where the answer begins or to its end."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": _QUESTION}]
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
    if answered:
        messages.append({"role": "assistant", "content": _ANSWER})
    return loaded.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=not answered
    )


def _constants(render: Callable[[int, bool], str], control: dict[str, int]) -> tuple[str, ...]:
    """Take the constants from rendered conversations and prove that they give these conversations back.

    Raises: ValueError saying what is not of the family's shape.
    """
    head, _, rest = render(0, False).partition(_SYSTEM)
    turn, _, reply = rest.partition(_QUESTION)
    vision = render(1, False).removeprefix(head + _SYSTEM + turn).removesuffix(_QUESTION + reply)
    for images in range(3):
        asked = head + _SYSTEM + turn + images * vision + _QUESTION + reply
        if render(images, False) != asked:
            raise ValueError("a turn is not system text, images and question in this order")
        if not render(images, True).startswith(asked + _ANSWER):
            raise ValueError("the answer is rewritten, or begins elsewhere than a generated one")
    end = render(2, True).removeprefix(asked + _ANSWER)
    stop = next((token for token in control if end.startswith(token)), "")
    if not stop or end.removeprefix(stop).strip():
        raise ValueError(f"an answer ends in {end!r}, not in a control token")
    units = [token for token in control if token in vision]
    if len(units) != 3 or len(vision) != sum(map(len, units)):
        raise ValueError(f"an image is {vision!r}, not three control tokens")
    for text in (head, turn, reply):
        if not text.startswith(tuple(control)) or not text.endswith(("\n", *control)):
            raise ValueError(f"{text!r} does not begin with a control token and end with one or a line feed")
    return head, turn, vision, reply, stop
