"""A small Hugging Face folder of the Qwen2.5-VL architecture, complete but for the weights.

It takes every road a released checkpoint takes: transformers reads its configuration, tokenizer, chat template and
preprocessor, and so do we. Only sizes and vocabulary are small. The tokenizer is byte-level BPE without merges, so
any text has an encoding; what the task says again and again (instruction, questions, answers, reasoning, whole
numbers) is held in added tokens of a phrase each, which match leftmost-longest wherever they occur.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from surgery_r1_jax import answer, codec, images, reasoning, vocabulary
from surgery_r1_jax.errors import InputError

PATCH, TIME, MERGE = 14, 2, 2  # pixels, frames, patches
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2.5-VL's
MAX_POSITIONS = 4096
VOCAB_MULTIPLE = 128  # embedding rows are padded to a multiple of this, so that they shard evenly

# Qwen2.5-VL's control tokens that a conversation with images can hold, in its order.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)

# How Qwen2 cuts text before BPE. Source: transformers:models/qwen2/tokenization_qwen2.py.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Renders what Qwen2.5-VL's own template renders, written anew.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif content['type'] == 'video' or 'video' in content -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model, in the words of its configuration; `size` is width and height of its pictures in pixels.

    Every picture of that shape is resized to `size`; with other shapes the area stays about the same.
    """

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384
    tower_width: int = 96
    tower_depth: int = 4
    tower_heads: int = 4
    tower_mlp: int = 288
    fullatt: tuple[int, ...] = (1, 3)  # tower blocks that attend to the whole picture instead of a window
    window_size: int = 56  # side in pixels
    size: tuple[int, int] = (140, 112)
    tie: bool = False
    # Columns turn with the slowest frequencies: at the released 1e6 a picture of a few units would have them all alike.
    rope_theta: float = 10.0
    mrope_section: tuple[int, int, int] = (4, 6, 6)  # time, row, column; their sum is half a head's width

    def __post_init__(self):
        unit = PATCH * MERGE
        for rule, broken in {
            f"size and window_size must be multiples of {unit}": any(v % unit for v in (*self.size, self.window_size)),
            "mrope_section must sum to hidden / heads / 2": 2 * sum(self.mrope_section) * self.heads != self.hidden,
            "tower_width must be a multiple of 4 * tower_heads": self.tower_width % (4 * self.tower_heads),
            "kv_heads must divide heads": self.heads % self.kv_heads,
            "fullatt must name blocks below tower_depth": not set(self.fullatt) <= set(range(self.tower_depth)),
        }.items():
            if broken:
                raise InputError(f"{rule}: {self}")


def write_folder(directory: str | Path, sizes: Sizes | None = None) -> Path:
    """Write model, generation, preprocessor and tokenizer files: the same bytes each time, and no weights."""
    sizes, directory = sizes or Sizes(), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(max(sizes.size))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})  # the processor reads no other
    _model_config(sizes, tokenizer).save_pretrained(directory)
    pad, _, end, *_ = map(tokenizer.token_to_id, SPECIAL_TOKENS)
    _write_json(directory / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad})
    area = sizes.size[0] * sizes.size[1]
    images.Preprocessor(PATCH, TIME, MERGE, area, area, MEAN, STD).to_folder(directory)
    return directory


def build_tokenizer(largest_number: int) -> tokenizers.Tokenizer:
    """Bytes, then Qwen's control tokens, then the phrases of the task and the whole numbers 0..largest_number."""
    alphabet = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    phrases = [*_phrases(), *map(str, range(largest_number + 1))]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in dict.fromkeys(phrases)])
    return tokenizer


def _phrases() -> Iterator[str]:
    """What the task's texts are made of, and joints of it that save a token where one phrase always follows another.

    The place is one token with its preposition, right after the instrument: a model of three layers binds it sooner.
    """
    yield from ("system", "user", "assistant")
    yield answer.instruction(codec.RESIZED_PIXELS.units)
    yield from vocabulary.EXTENDED_CLASSES
    for kind in range(vocabulary.OTHER):
        yield from filter(None, vocabulary.ask(kind, "|").split("|"))
    yield from (place.replace("-", " ") for place in vocabulary.LOCATIONS)  # as questions spell it
    yield from filter(None, (answer.prompt("", want) for want in range(len(answer.WANT))))
    yield from answer.PIECES
    yield from reasoning.PIECES
    yield from (f"<think>{piece}" for piece in reasoning.PIECES if piece.startswith("The "))
    yield from (f".{piece}" for piece in answer.PIECES if piece.startswith("</think>"))
    yield from (f"{at}{place}" for at in (" at ", " is at ") for place in vocabulary.LOCATIONS)
    yield from (f" of the {organ} is " for organ in vocabulary.ORGANS)


def _tokenizer_config(tokenizer: tokenizers.Tokenizer) -> dict:
    """What transformers needs besides tokenizer.json, in the form of the released checkpoints."""
    added = {}
    for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        flags = {name: getattr(token, name) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")}
        added[str(index)] = {"content": token.content, **flags}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _model_config(sizes: Sizes, tokenizer: tokenizers.Tokenizer) -> transformers.PreTrainedConfig:
    """The architecture, with rows to spare in the vocabulary as the released checkpoints have them."""
    rows = (tokenizer.get_vocab_size() // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE
    ids = tokenizer.token_to_id
    text = {
        "vocab_size": rows,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": sizes.rope_theta,
            "mrope_section": list(sizes.mrope_section),
        },
        "bos_token_id": None,
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    vision = {
        "hidden_size": sizes.tower_width,
        "out_hidden_size": sizes.hidden,
        "intermediate_size": sizes.tower_mlp,
        "depth": sizes.tower_depth,
        "num_heads": sizes.tower_heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TIME,
        "window_size": sizes.window_size,
        "fullatt_block_indexes": list(sizes.fullatt),
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=sizes.tie,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
    )


def _write_json(file: Path, entries: dict) -> None:
    file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", "utf-8")
