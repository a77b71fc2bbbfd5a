import os
os.environ["HF_HUB_OFFLINE"] = "1"          # before huggingface_hub is imported: no test may ask the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import pytest, torch
torch.set_num_threads(1)    # the models are tiny: more threads only wait for each other

@pytest.fixture(scope="session")
def local_models(tmp_path_factory):
    "Folders of a tiny teacher and a tiny student of each architecture: {kind: (teacher, student)}."
    from tiny_runs import save_pair
    from tiny_models import KINDS
    return {kind: save_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}

@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    "One cache of artefacts for all tests that do not look at it: teachers are tuned once."
    return tmp_path_factory.mktemp("cache")
