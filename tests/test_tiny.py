"""tiny.py: the folder is complete, readable by transformers without torch, and its tokenizer is short and total."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from surgery_r1_jax import answer, images, reasoning, tiny, vocabulary
from surgery_r1_jax.chat import Chat
from surgery_r1_jax.errors import InputError
from surgery_r1_jax.records import Frame, Record

INSTRUCTION = answer.instruction("whole pixels of the image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def grammar_texts():
    """The instruction, every question, and completions to each of them with reasoning and without."""
    yield INSTRUCTION
    for number, tool in enumerate(vocabulary.TOOLS):
        for state, place in zip(vocabulary.STATES, vocabulary.LOCATIONS * 4, strict=False):
            labels = ((vocabulary.STATE, state), (vocabulary.LOCATION, place), (vocabulary.ORGAN, "kidney"))
            records = [record(kind, name, tool, number) for kind, name in labels]
            records.append(record(vocabulary.TOOL, tool, place, number))
            for some in (records, records[:1] + records[2:], records[:2], records[:1], records[1:2]):
                frame = Frame("seq_2/frame000", "seq_2", Path("x.png"), 140, 112, tuple(some))
                for one in some:
                    yield answer.prompt(one.question)
                    for think in (reasoning.write(frame, one), None):
                        yield answer.render(answer=one.answer, box=(0, 7, 139, 112), think=think)
                        yield answer.render(answer=one.answer, think=think)
                        yield answer.render(box=(100, 20, 140, 99), think=think)
    for want in range(len(answer.WANT)):
        yield answer.prompt("Where is suction located?", want)


def record(kind, name, topic, number):
    tool = topic if kind in (vocabulary.STATE, vocabulary.LOCATION) else None
    box = (number / 10, 0.0, 1.0, 1.0)
    return Record(vocabulary.ask(kind, topic), name, box, kind, tool, "label.txt:1")


def test_grammar_texts_are_decoded_to_themselves(tokenizer):
    for text in grammar_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(max_codepoint=127)) | st.lists(st.sampled_from(tiny.SPECIAL_TOKENS)).map("0".join))
def test_any_ascii_text_is_decoded_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_grammar_texts_are_made_of_phrases_and_not_of_letters(tokenizer):
    for text in grammar_texts():
        for id in tokenizer.encode(text):
            assert id >= 256 or tokenizer.decode([id]) in "0123456789?.", (text, tokenizer.decode([id]))


def test_a_completion_with_reasoning_is_17_tokens_and_a_question_8(folder):
    chat = Chat.from_folder(folder)
    think = "The monopolar_curved_scissors at right-bottom of the kidney is Tissue_Manipulation."
    text = answer.render(answer="Tissue_Manipulation", box=(10, 20, 110, 100), think=think)
    completion, question = chat.completion_ids(text), chat.prompt_ids("What is the state of prograsp_forceps?")
    print([chat.tokenizer.decode([id], skip_special_tokens=False) for id in completion])
    assert len(completion) == 17 and len(question) == 8
    assert len(chat.prefix_ids(INSTRUCTION, (20,))) == 9 + 22


def test_the_place_is_one_token_directly_after_the_instrument(tokenizer):
    for tool in vocabulary.TOOLS:
        for place in vocabulary.LOCATIONS:
            for text in (
                f"<think>The {tool} at {place} of the kidney",
                f"<think>The {tool} is at {place} of the kidney",
            ):
                spoken = [tokenizer.decode([id]) for id in tokenizer.encode(text)]
                assert spoken[1] == tool and spoken[2].endswith(f" at {place}")


def test_every_coordinate_is_one_token(folder):
    chat = Chat.from_folder(folder)
    for number in range(max(tiny.Sizes().size) + 1):
        assert len(chat.completion_ids(str(number))) == 2
    values = chat.number_values(512)
    assert sorted(values[values >= 0]) == list(range(141))


def test_the_vocabulary_is_bytes_then_control_tokens_then_phrases_then_padding(folder, tokenizer):
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert tokenizer.convert_tokens_to_ids(list(tiny.SPECIAL_TOKENS)) == list(
        range(256, 256 + len(tiny.SPECIAL_TOKENS))
    )
    assert rows % tiny.VOCAB_MULTIPLE == 0 and rows > len(tokenizer) == 1 + max(tokenizer.get_vocab().values())
    assert set(tokenizer.all_special_ids) == set(range(256, 256 + len(tiny.SPECIAL_TOKENS)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_transformers_reads_the_folder_without_torch_and_the_bytes_repeat(folder, tmp_path):
    """In a fresh process with another hash seed, where importing torch fails."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import transformers\n"
        "from surgery_r1_jax import tiny\n"
        "folder = tiny.write_folder(sys.argv[1])\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)\n"
        "config = transformers.AutoConfig.from_pretrained(folder)\n"
        "assert tokenizer.convert_tokens_to_ids('<|image_pad|>') == config.image_token_id\n"
        "print(type(config).__name__, tokenizer.encode('Where is suction located?'))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    expected = Chat.from_folder(folder).prompt_ids("Where is suction located?")[:3]
    assert done.stdout.strip() == f"Qwen2_5_VLConfig {expected}", done.stderr
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir()) and len(names) == 6
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_the_configuration_says_what_was_asked_for(tmp_path):
    small = {"hidden": 64, "layers": 2, "mlp": 96, "tower_depth": 2, "fullatt": (1,), "mrope_section": (2, 3, 3)}
    sizes = tiny.Sizes(**small, size=(168, 140), tie=False, rope_theta=5e3)
    config = transformers.AutoConfig.from_pretrained(tiny.write_folder(tmp_path, sizes))
    text, tower = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (64, 2, 96)
    assert (text.num_attention_heads, text.num_key_value_heads, config.tie_word_embeddings) == (4, 2, False)
    assert text.rope_parameters["rope_theta"] == 5e3 and text.rope_parameters["mrope_section"] == [2, 3, 3]
    assert (tower.hidden_size, tower.out_hidden_size, tower.depth, tower.num_heads) == (96, 64, 2, 4)
    assert (tower.fullatt_block_indexes, tower.window_size, tower.patch_size) == ([1], 56, 14)
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    ends = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert ends.eos_token_id == [text.eos_token_id, text.pad_token_id]


def test_pictures_of_the_frames_shape_get_the_size_asked_for(folder):
    preprocessor = images.Preprocessor.from_folder(folder)
    for size in ((1280, 1024), (640, 512), (320, 256), (140, 112), (1350, 1080)):
        assert preprocessor.resized(*size) == (140, 112)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (140, 111)},
        {"window_size": 50},
        {"hidden": 96},
        {"tower_width": 90},
        {"kv_heads": 3},
        {"fullatt": (4,)},
    ],
    ids=str,
)
def test_sizes_that_make_no_model_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        tiny.Sizes(**wrong)


def test_transformers_runs_a_model_on_the_folder(folder):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle here and is not installed")
    chat, preprocessor = Chat.from_folder(folder), images.Preprocessor.from_folder(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    rows, (gh, gw) = preprocessor.patches(Image.new("RGB", (1280, 1024), (150, 60, 50)))
    ids = np.array([chat.prefix_ids(INSTRUCTION, [gh * gw // 4]) + chat.prompt_ids("Where is suction located?")])
    out = model(
        input_ids=torch.tensor(ids),
        mm_token_type_ids=torch.tensor(ids == chat.image_id).long(),
        pixel_values=torch.tensor(rows),
        image_grid_thw=torch.tensor([[1, gh, gw]]),
    )
    assert out.logits.shape == (1, ids.shape[1], config.text_config.vocab_size) and torch.isfinite(out.logits).all()
