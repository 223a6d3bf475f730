"""A toy data set and a toy start model on disk, and configurations of short runs on them."""

import jax

from surgery_r1_jax import evaluate, hf, model, pipeline, run, synth, tiny

SIZES = tiny.Sizes(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=2,
    mlp=64,
    tower_width=32,
    tower_depth=2,
    tower_heads=2,
    tower_mlp=64,
    fullatt=(1,),
    size=(84, 56),
    mrope_section=(2, 3, 3),
)


def write_data(root, frames=8, sequences=("seq_2", "seq_15")):
    """Frames in the EndoVis layout, one instrument each; seq_2 trains, seq_15 is the dev split."""
    synth.write(root, frames=frames, seed=3, size=(112, 84), max_tools=1, sequences=sequences)
    return root


def write_model(folder, seed=0, sizes=SIZES):
    """A whole Hugging Face folder with freshly drawn weights."""
    bare = tiny.write_folder(folder.with_name(folder.name + "_bare"), sizes)
    settings = hf.read_config(bare)
    return hf.write_folder(folder, model.init(settings, seed), settings, bare)
