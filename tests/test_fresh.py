"""`surgery-r1 init`: a tiny model to start from, the same for the same seed."""

import numpy as np
import pytest
import toy

from surgery_r1_jax import checkpoint, cli, fresh, hf
from surgery_r1_jax.errors import InputError


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def test_the_folder_is_a_model_to_start_from(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "tiny"), "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"untrained tiny model written to {tmp_path / 'tiny'}\n"
    loaded = checkpoint.load_model(tmp_path / "tiny")
    assert loaded.params["embed"].shape[0] == loaded.config.text.vocab_size
    assert np.isfinite(loaded.params["embed"]).all()
    assert hf.encoder_of(loaded.folder, loaded.config).chat.stop_id


def test_the_seed_decides_the_weights_and_an_existing_folder_is_kept(tmp_path):
    one, same, other = (
        fresh.write(tmp_path / name, seed=seed, sizes=toy.SIZES) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert weights(one) == weights(same) != weights(other)
    with pytest.raises(InputError, match="already exists"):
        fresh.write(one, seed=2, sizes=toy.SIZES)
    assert weights(one) == weights(same)
