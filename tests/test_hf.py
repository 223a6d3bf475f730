"""Folders in and out: every tensor used once, nothing lost, nothing half-written, and every fault named."""

import json
import shutil
import struct
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import toy
from flax import nnx
from flax.traverse_util import unflatten_dict

from surgery_r1_jax import hf, model, placement, qwen2_5_vl, sharding, tensors, tiny, vocabulary
from surgery_r1_jax.errors import InputError

SHARD_BYTES = 60_000


def drawn(settings, seed=0):
    """Parameters with no two numbers alike, without compiling anything."""
    random = np.random.default_rng(seed)
    flat = {path: variable.get_value().shape for path, variable in nnx.to_flat_state(model.build(settings)[1])}
    return unflatten_dict({path: random.normal(size=shape).astype(np.float32) for path, shape in flat.items()})


def tensors_of(folder):
    """All tensors of a folder by name."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in safetensors.numpy.load_file(f).items()}


def assert_equal_trees(found, want):
    jax.tree.map(np.testing.assert_array_equal, found, want)


either_head = pytest.mark.parametrize("bare", [True, False], ids=["tied", "untied"], indirect=True)


@pytest.fixture(scope="module")
def bare(request, tmp_path_factory):
    """A folder without weights, with a head of its own unless said otherwise."""
    sizes = tiny.Sizes(**{**vars(toy.SIZES), "tie": getattr(request, "param", False)})
    return tiny.write_folder(tmp_path_factory.mktemp("bare"), sizes)


@pytest.fixture(scope="module")
def settings(bare):
    return hf.read_config(bare)


@pytest.fixture(scope="module")
def sharded(bare, settings, tmp_path_factory):
    """A folder with several shards; tests copy it before they harm it."""
    out = tmp_path_factory.mktemp("sharded") / "folder"
    return hf.write_folder(out, drawn(settings), settings, bare, max_shard_bytes=SHARD_BYTES)


@pytest.fixture
def folder(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "folder")


# The table


@either_head
def test_the_table_covers_exactly_the_parameters(settings):
    flat = {".".join(path): v.get_value().shape for path, v in nnx.to_flat_state(model.build(settings)[1])}
    assert set(flat) == set(qwen2_5_vl.NAMES) - ({"head"} if settings.tie_word_embeddings else set())
    for where, shape in flat.items():
        stacked = shape[0] if ".blocks." in where else None
        depth = settings.vision.depth if where.startswith("tower") else settings.text.num_hidden_layers
        assert ("{i}" in qwen2_5_vl.NAMES[where][0]) == (stacked is not None) and stacked in (None, depth)
    names = [name for name, _ in qwen2_5_vl.NAMES.values()]
    assert len(set(names)) == len(names)


def test_every_form_undoes_itself(settings):
    random = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(model.build(settings)[1]):
        name, form = qwen2_5_vl.NAMES[".".join(path)]
        shape = variable.get_value().shape[1 if "{i}" in name else 0 :]
        ours = random.normal(size=shape)
        np.testing.assert_array_equal(form.from_file(form.to_file(ours, settings.vision), shape), ours)


# There and back


@either_head
def test_parameters_survive_the_way_out_and_in_and_tensors_the_way_in_and_out(bare, settings, sharded, tmp_path):
    params = drawn(settings)
    read = hf.read_params(sharded, settings)
    assert_equal_trees(read, params)
    again = hf.write_folder(tmp_path / "again", read, settings, sharded)
    assert [f.name for f in again.glob("*.safetensors*")] == ["model.safetensors"]
    before, after = tensors_of(sharded), tensors_of(again)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert hf.read_config(again) == settings


def test_shards_are_small_named_as_usual_and_indexed(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    contents = {f.name: safetensors.numpy.load_file(f) for f in files}
    assert index["weight_map"] == {name: file for file, held in contents.items() for name in held}
    sizes = {file: sum(t.nbytes for t in held.values()) for file, held in contents.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert len(files) > 2 and all(sizes[f] <= SHARD_BYTES or len(contents[f]) == 1 for f in sizes)
    left = {f.name for f in sharded.iterdir()} - {f.name for f in files} - {"model.safetensors.index.json"}
    assert left == {f.name for f in sharded.iterdir() if f.name in hf.SIDE_FILES} >= {"config.json", "tokenizer.json"}


def test_bfloat16_out_and_in_again_rounds_once(bare, settings, tmp_path):
    params = drawn(settings)
    out = hf.write_folder(tmp_path / "half", params, settings, bare, dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    read = hf.read_params(out, settings)
    assert_equal_trees(read, jax.tree.map(lambda p: p.astype(ml_dtypes.bfloat16).astype(np.float32), params))
    twice = hf.write_folder(tmp_path / "twice", read, settings, out, dtype="bfloat16")
    assert (twice / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_parameters_are_spread_over_a_mesh_with_the_same_values(settings, sharded):
    mesh = sharding.make_mesh((2, 2, 2))
    shardings = sharding.of_params(model.build(settings)[1], mesh)
    read = hf.read_params(sharded, settings, shardings)
    assert_equal_trees(jax.tree.map(lambda p: p.sharding, read), shardings)
    assert_equal_trees(read, drawn(settings))


def test_names_as_transformers_holds_them_in_memory_are_read_too(settings, folder):
    tensors = tensors_of(folder)
    for file in folder.glob("model*"):
        file.unlink()
    longer = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: value
        for name, value in tensors.items()
    }
    longer = {name.replace("visual.", "model.visual.", 1): value for name, value in longer.items()}
    assert not set(tensors) & set(longer) - {"lm_head.weight"}
    safetensors.numpy.save_file(longer, folder / "model.safetensors")
    assert_equal_trees(hf.read_params(folder, settings), drawn(settings))
    safetensors.numpy.save_file(longer | tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: holds '.*' a second time"):
        hf.read_params(folder, settings)


@either_head
def test_a_tied_head_that_is_stored_all_the_same_is_left_out(folder, settings):
    change(folder, "lm_head.weight", np.zeros((2, 2), np.float32))
    if settings.tie_word_embeddings:
        assert_equal_trees(hf.read_params(folder, settings), drawn(settings))
    else:
        with pytest.raises(InputError, match=r"'lm_head\.weight' has shape \[2, 2\]"):
            hf.read_params(folder, settings)


def test_every_shard_is_opened_once(settings, sharded, monkeypatch):
    opened, open_file = [], safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **how: opened.append(path) or open_file(path, **how))
    hf.read_params(sharded, settings)
    assert sorted(opened) == sorted(sharded.glob("*.safetensors"))


def test_reading_holds_one_parameter_and_the_tensors_being_read_beside_the_devices(tmp_path, monkeypatch):
    sizes = tiny.Sizes(**{**vars(toy.SIZES), "layers": 16, "mlp": 1024})
    bare = tiny.write_folder(tmp_path / "bare", sizes)
    settings = hf.read_config(bare)
    params = drawn(settings)
    out = hf.write_folder(tmp_path / "out", params, settings, bare)
    tensors = {name: value.nbytes for name, value in tensors_of(out).items()}
    stack, largest = max(p.nbytes for p in jax.tree.leaves(params)), max(tensors.values())
    assert stack > 8 * largest
    # As if everything had gone to a device. A tensor being read is held with what tells whether it is finite.
    monkeypatch.setattr(placement.Parts, "array", lambda parts: None)
    tracemalloc.start()
    hf.read_params(out, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stack < peak < stack + 2 * hf.READERS * largest + 300_000 < 2 * stack, (largest, peak, stack)


# The configuration


def flat_config(settings, **more):
    """config.json as the releases of January 2025 spell it."""
    text, tower = settings.text, settings.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_token_id": settings.image_token_id,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": text.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": tower.depth,
            "fullatt_block_indexes": list(tower.fullatt_block_indexes),
            "hidden_act": "silu",
            "hidden_size": tower.hidden_size,
            "in_chans": tower.in_channels,
            "intermediate_size": tower.intermediate_size,
            "model_type": "qwen2_5_vl",
            "num_heads": tower.num_heads,
            "out_hidden_size": tower.out_hidden_size,
            "patch_size": tower.patch_size,
            "spatial_merge_size": tower.spatial_merge_size,
            "spatial_patch_size": tower.patch_size,
            "temporal_patch_size": tower.temporal_patch_size,
            "tokens_per_second": 2,
            "window_size": tower.window_size,
        },
        "vocab_size": text.vocab_size,
        **more,
    }


@either_head
def test_old_and_new_spellings_of_the_configuration_mean_the_same(bare, settings, tmp_path):
    assert "text_config" in json.loads((bare / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(flat_config(settings)))
    assert hf.read_config(tmp_path) == settings
    (tmp_path / "config.json").write_text(
        json.dumps(flat_config(settings, tie_word_embeddings=not settings.tie_word_embeddings))
    )
    assert hf.read_config(tmp_path).tie_word_embeddings is not settings.tie_word_embeddings


def test_the_dtype_keeps_the_spelling_of_the_configuration(settings, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/config.json").write_text(json.dumps(flat_config(settings)))
    out = hf.write_folder(tmp_path / "out", drawn(settings), settings, tmp_path / "in")
    written = json.loads((out / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and "dtype" not in written


def without(entries, key):
    return {name: value for name, value in entries.items() if name != key}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda c: c | {"model_type": "qwen3_5"},
            "model_type 'qwen3_5' is not supported; supported: qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe",
        ),
        (lambda c: without(c, "model_type"), "model_type 'None' is not supported"),
        (lambda c: c | {"use_sliding_window": True}, "use_sliding_window True is not supported"),
        (lambda c: c | {"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        (lambda c: c | {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (lambda c: c | {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}}, "yarn"),
        (lambda c: without(c, "rope_scaling"), "no mrope_section in rope_scaling or rope_parameters"),
        (
            lambda c: c | {"vision_config": c["vision_config"] | {"depth": 3, "fullatt_block_indexes": [0, 2]}},
            "fullatt_block_indexes [0, 2] with depth 3: only equal groups",
        ),
        (lambda c: c | {"vision_config": c["vision_config"] | {"hidden_act": "gelu"}}, "vision_config.hidden_act gelu"),
        (lambda c: [c], "not a JSON object"),
        (lambda c: c | {"num_hidden_layers": "two"}, "num_hidden_layers"),
    ],
    ids=range(11),
)
def test_a_configuration_that_would_be_computed_wrongly_is_refused(settings, tmp_path, change, reason):
    (tmp_path / "config.json").write_text(json.dumps(change(flat_config(settings))))
    refuses(lambda: hf.read_config(tmp_path), tmp_path / "config.json", reason)


def test_a_missing_or_broken_configuration_is_refused(tmp_path):
    refuses(lambda: hf.read_config(tmp_path), tmp_path, "no config.json")
    (tmp_path / "config.json").write_text('{"model_type": ')
    refuses(lambda: hf.read_config(tmp_path), tmp_path / "config.json", "not a JSON object")


def test_a_folder_that_brings_code_along_runs_none_of_it(settings, tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n")
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}, "model_file": "evil.py"}
    (tmp_path / "config.json").write_text(json.dumps(flat_config(settings, **code)))
    assert hf.read_config(tmp_path) == settings
    assert not marker.exists()


# Weights that are not as they should be


def refuses(action, where, reason):
    """The action raises an InputError of one line that begins with the place and holds the reason."""
    with pytest.raises(InputError) as refused:
        action()
    message = str(refused.value)
    assert message.startswith(f"{where}") and reason in message and "\n" not in message, message


def shard_of(folder, name):
    return folder / json.loads((folder / tensors.INDEX).read_text())["weight_map"][name]


def change(folder, name, value):
    """Store another value under a name in a sharded folder, or none."""
    index = json.loads((folder / tensors.INDEX).read_text())
    shard = folder / index["weight_map"].setdefault(name, index["weight_map"][NORM])
    held = safetensors.numpy.load_file(shard)
    if value is None:
        del held[name], index["weight_map"][name]
    else:
        held[name] = value
    safetensors.numpy.save_file(held, shard)
    (folder / tensors.INDEX).write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"
WIDTH = toy.SIZES.hidden


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (NORM, None, f"tensor '{NORM}' is missing (parameter decoder.blocks.norm1.scale)"),
        ("visual.extra", np.zeros(3, np.float32), "unknown tensors visual.extra; they match no parameter"),
        (NORM, np.zeros(WIDTH + 1, np.float32), f"has shape [{WIDTH + 1}], but config.json makes it [{WIDTH}]"),
        (NORM, np.zeros((WIDTH, 1), np.float32), f"has shape [{WIDTH}, 1], but config.json makes it [{WIDTH}]"),
        (NORM, np.zeros(WIDTH, np.int8), "has type I8; only float32, bfloat16 and float16"),
        (NORM, np.full(WIDTH, np.nan, np.float32), "not finite"),
        (NORM, np.append(np.zeros(WIDTH - 1, np.float32), np.float32(-np.inf)), "not finite"),
    ],
    ids=["missing", "extra", "longer", "another rank", "integers", "NaN", "infinity"],
)
def test_a_tensor_that_does_not_fit_is_named(settings, folder, name, value, reason):
    change(folder, name, value)
    in_file = value is not None and name == NORM
    refuses(lambda: hf.read_params(folder, settings), shard_of(folder, NORM) if in_file else folder, reason)


def test_many_unknown_tensors_are_counted(settings, folder):
    for i in range(5):
        change(folder, f"visual.extra{i}", np.zeros(1, np.float32))
    refuses(lambda: hf.read_params(folder, settings), folder, "visual.extra0, visual.extra1, visual.extra2 and 2 more")


def test_a_truncated_or_lengthened_shard_is_refused(settings, folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:7], b"", whole + b"\0"):
        shard.write_bytes(data)
        refuses(lambda: hf.read_params(folder, settings), shard, "not a whole safetensors file")


def test_an_index_and_its_files_must_agree(settings, folder, tmp_path):
    index, first, last = folder / tensors.INDEX, shard_of(folder, NORM), max(folder.glob("*.safetensors"))
    right, name = json.loads(index.read_text()), NORM
    shutil.copyfile(first, tmp_path / "outside.safetensors")
    for file in ("model-9.safetensors", "../outside.safetensors", str(tmp_path / "outside.safetensors"), "", 3, None):
        index.write_text(json.dumps({"weight_map": right["weight_map"] | {name: file}}))
        refuses(lambda: hf.read_params(folder, settings), index, f"names the file '{file}', which is not in the folder")
    index.write_text(json.dumps({"weight_map": right["weight_map"] | {name: last.name}}))
    refuses(lambda: hf.read_params(folder, settings), first, f"holds '{name}', which {tensors.INDEX} places elsewhere")
    index.write_text(json.dumps({"weight_map": without(right["weight_map"], name)}))
    refuses(lambda: hf.read_params(folder, settings), first, f"holds '{name}', which {tensors.INDEX} places elsewhere")
    index.write_text(json.dumps({"weight_map": right["weight_map"] | {"ghost": first.name}}))
    refuses(lambda: hf.read_params(folder, settings), index, "tensor 'ghost' is in none of the files")
    for broken in ("[]", "{}", "{", '{"weight_map": [1]}', "[" * 100_000):
        index.write_text(broken)
        refuses(lambda: hf.read_params(folder, settings), index, "not a weight index")


def test_a_tensor_in_two_shards_is_refused(settings, folder):
    source, target = shard_of(folder, NORM), max(folder.glob("*.safetensors"))
    held = safetensors.numpy.load_file(target)
    safetensors.numpy.save_file(held | {NORM: safetensors.numpy.load_file(source)[NORM]}, target)
    refuses(lambda: hf.read_params(folder, settings), target, f"holds '{NORM}', which {tensors.INDEX} places elsewhere")


def test_pickled_weights_are_not_read(settings, bare, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "old")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refuses(lambda: hf.read_params(folder, settings), folder, "only safetensors weights are read")


def header_attacks():
    """Safetensors files whose header lies."""

    def made(header, data=b"\0" * 64, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    good = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    yield made({"a": good}, length=2**63)
    yield made({"a": good}, length=100_000_001)
    yield made({"a": good, "b": good})  # overlap
    yield made({"a": good | {"data_offsets": [0, 32], "shape": [8]}})  # hole at the end
    yield made({"a": good | {"data_offsets": [64, 0]}})
    yield made({"a": good | {"data_offsets": [-64, 0]}})
    yield made({"a": good | {"shape": [-16]}})
    yield made({"a": good | {"shape": [2**62, 2**62]}})
    yield made({"a": good | {"dtype": "F64"}})
    yield made({"a": good | {"dtype": "OBJ"}})
    yield made({"a": good | {"data_offsets": [0, 2**64]}})
    yield made(
        b'{"a": ' + json.dumps(good).encode() + b', "a": ' + json.dumps(good | {"shape": [4, 4]}).encode() + b"}"
    )
    yield made(b"[" * 50_000)
    yield made(b"\xff\xfe")
    yield made([good])


@pytest.mark.parametrize("attack", list(header_attacks()), ids=range(15))
def test_a_lying_header_is_refused(settings, bare, tmp_path, attack):
    folder = shutil.copytree(bare, tmp_path / "lying")
    (folder / "model.safetensors").write_bytes(attack)
    with pytest.raises(InputError) as refused:
        hf.read_params(folder, settings)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < len(str(folder)) + 400


def test_spoiled_headers_raise_nothing_but_refusals(bare, settings, tmp_path):
    folder = hf.write_folder(tmp_path / "out", drawn(settings), settings, bare)
    whole = bytearray((folder / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", whole[:8])[0]
    random, refused = np.random.default_rng(0), 0
    for _ in range(40):
        spoiled = bytearray(whole)
        for at in random.integers(0, 8 + length, random.integers(1, 4)):
            spoiled[at] = random.integers(256)
        (folder / "model.safetensors").write_bytes(spoiled)
        try:
            hf.read_params(folder, settings)
        except InputError:
            refused += 1
    assert refused > 30


# Writing that fails


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "key"])
def test_a_failed_export_leaves_nothing(settings, bare, tmp_path, failure):
    files = []

    def fails_halfway(name, done, total):
        files[:] = (tmp_path / "deep").rglob("*.safetensors")
        if done > total / 2:
            raise failure

    how = dict(max_shard_bytes=SHARD_BYTES, tell=fails_halfway)
    with pytest.raises(type(failure)):
        hf.write_folder(tmp_path / "deep" / "out", drawn(settings), settings, bare, **how)
    assert len(files) > 2
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_export_never_overwrites(settings, bare, tmp_path):
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "keep.txt").write_text("mine")
    file.write_text("mine")
    for target in (full, file):
        refuses(lambda t=target: hf.write_folder(t, drawn(settings), settings, bare), target, "give a new one")
    assert (full / "keep.txt").read_text() == file.read_text() == "mine"
    assert hf.write_folder(empty, drawn(settings), settings, bare) == empty
    assert (empty / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_a_folder_tells_the_answers_it_was_trained_on(tmp_path):
    assert hf.read_classes(tmp_path) == vocabulary.CLASSES
    hf.write_classes(tmp_path, ("open", "shut"))
    assert hf.read_classes(tmp_path) == ("open", "shut")
    for text in ("{", "[]", '"open"', "[1]", "[" * 9999):
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(InputError, match="not a list of names"):
            hf.read_classes(tmp_path)
