"""Fixtures of all tests. Everything runs offline, on the CPU, and away from the user's caches."""

import atexit
import os
import shutil
import signal
import sys
import tempfile

# Before any import of the libraries that read these. Workers of pytest-xdist inherit the cache of their parent.
if "PYTEST_XDIST_WORKER" not in os.environ:
    cache = tempfile.mkdtemp(prefix="test_cache_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    # Set one by one: a variable of the user's would win over HF_HOME.
    for name, folder in (
        ("HF_HOME", "hf"),
        ("HF_HUB_CACHE", "hf/hub"),
        ("HF_ASSETS_CACHE", "hf/assets"),
        ("HF_DATASETS_CACHE", "hf/datasets"),
        ("HF_MODULES_CACHE", "hf/modules"),
        ("WANDB_DIR", "wandb"),
        ("WANDB_CACHE_DIR", "wandb/cache"),
        ("WANDB_CONFIG_DIR", "wandb/config"),
        ("XDG_CACHE_HOME", "xdg"),
        ("TRITON_CACHE_DIR", "triton"),
    ):
        os.environ[name] = os.path.join(cache, folder)
        os.makedirs(os.environ[name], exist_ok=True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY"):
        os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["BITSANDBYTES_NOWELCOME"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
from pathlib import Path

import pytest
from fake_hub import FakeHub
from image_data import write_image_folder, write_messy_folder
from running import REPO, TRAIN_TEXT_TO_IMAGE


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="run tests/torture at full length, as `make torture` does")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked `torture`, unless it is asked for."""
    if not config.getoption("--torture"):
        long = [item for item in items if item.get_closest_marker("torture")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


SIGNALS = (signal.SIGTERM, signal.SIGINT)


def load_script(path):
    """Imports a script by its path, as a module named like the file."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataloader workers and dataclasses look the module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


@pytest.fixture(scope="session")
def repo():
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def train_script():
    """examples/text_to_image/train_text_to_image.py as a module."""
    return load_script(TRAIN_TEXT_TO_IMAGE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Has messages come in lines as they were written: tests/test_messages.py is on where they end. By a fixture
    pytest itself would write as wide, too, before it ends."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(getattr(item.module, "COLUMNS", 10_000))
    try:
        return (yield)
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


@pytest.fixture(autouse=True)
def clean_process():
    """Undoes what a script's main() leaves in the process, as if every test ran in a process of its own."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    folder = os.getcwd()
    yield
    os.chdir(folder)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if "torch" in sys.modules:
        import torch

        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(True)
        torch.backends.cuda.matmul.allow_tf32 = False


def _save_pipeline(tmp_path_factory, name, **options):
    from tiny import make_pipeline  # here: tests that need no pipeline do not wait for the imports

    folder = tmp_path_factory.mktemp(name)
    make_pipeline(**options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """Folder of a random-weight StableDiffusionPipeline (factor 8, 4 latent channels, epsilon). Read only."""
    return _save_pipeline(tmp_path_factory, "tiny_pipeline")


@pytest.fixture(scope="session")
def tiny_pipeline_v(tmp_path_factory):
    """As tiny_pipeline, with the same weights and a scheduler for v-prediction. Read only."""
    return _save_pipeline(tmp_path_factory, "tiny_pipeline_v", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_pipeline_sd1(tmp_path_factory):
    """As tiny_pipeline, with the block layout of SD 1 in the UNet: four levels of two layers. Read only."""
    return _save_pipeline(tmp_path_factory, "tiny_pipeline_sd1", num_blocks=4, layers_per_block=2)


@pytest.fixture(scope="session")
def tiny_captioner(tmp_path_factory):
    """Folder of a BLIP with random weights that says a few words of every image. Read only."""
    from tiny import make_captioner

    folder = tmp_path_factory.mktemp("tiny_captioner")
    for part in make_captioner():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    """Factory: image_folder(num_images=6, size=32, captions=None, name="images") -> Path."""

    def make(num_images=6, size=32, captions=None, name="images"):
        return write_image_folder(tmp_path / name, num_images, size, captions)

    return make


@pytest.fixture
def messy_folder(tmp_path):
    """Factory: messy_folder(num_good=4, size=32, missing_caption="null", name="messy") -> MessyFolder."""

    def make(num_good=4, size=32, missing_caption="null", name="messy"):
        return write_messy_folder(tmp_path / name, num_good, size, missing_caption)

    return make


@pytest.fixture
def fake_hub():
    """A running stand-in for the Hub; give its `env` to a subprocess."""
    hub = FakeHub().start()
    yield hub
    hub.stop()
