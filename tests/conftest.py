"""What all tests share: eight virtual CPU devices, no network, strict shapes."""

import os
import tempfile
from pathlib import Path

import flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags.QUICK} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "surgery_r1_jax_tests_xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def real_frames() -> Path:
    """The folder of real EndoVis-18 frames, or a skip that says why."""
    root = SHARED / "data" / "endovis18" / "EndoVis-18-VQLA"
    if not root.is_dir():
        pytest.skip(f"real EndoVis-18 frames are not here: {root}")
    return root


@pytest.fixture(scope="session")
def config():
    """A tiny Qwen2.5-VL with everything in it that the large ones have."""
    import randomised

    return randomised.config()


@pytest.fixture(scope="session")
def params(config):
    """Parameters of it, none at its neutral value."""
    import toy

    return toy.params(config)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The encoder of a tiny model's folder."""
    import toy

    from surgery_r1_jax import hf, tiny

    folder = tiny.write_folder(tmp_path_factory.mktemp("tiny"), toy.SIZES)
    return hf.encoder_of(folder, hf.read_config(folder))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What short runs of a module start from: `data` and `start`."""
    import toy

    return toy.write_start(tmp_path_factory.mktemp("place"), frames=10)


@pytest.fixture
def uneven_rewards(monkeypatch):
    """Untrained models never earn anything: half of their completions shall count as well formed."""
    from surgery_r1_jax import grade

    real = grade.grade

    def graded(tokens_BJT, *rest):
        found = real(tokens_BJT, *rest)
        even_BJ = found.judged.valid & (tokens_BJT.sum(-1) % 2 == 0)
        return found._replace(judged=found.judged._replace(format_ok=even_BJ))

    monkeypatch.setattr(grade, "grade", graded)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """A function giving (folder, torch model) of a randomised tiny model, made once per variant."""
    pytest.importorskip("torch", reason="parity with transformers needs a CPU build of PyTorch")
    import randomised

    made = {}

    def get(tied: bool = False, family: str = "qwen2_5_vl"):
        if (family, tied) not in made:
            made[family, tied] = randomised.write(tmp_path_factory.mktemp("hf"), family=family, tied=tied)
        return made[family, tied]

    return get
