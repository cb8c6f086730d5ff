"""attn_implementation="fastattn" is there after `import fastattn`, in either order, and nothing is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.model

USE = """
config = BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64)
model = AutoModel.from_config(config, attn_implementation="fastattn")
assert model.config._attn_implementation == "fastattn"
from fastattn.models.interface import attention_forward
assert AttentionInterface()["fastattn"] is attention_forward
print(len([each for each in sys.meta_path if type(each).__module__.startswith("fastattn")]))
"""
TRANSFORMERS = "from transformers import AttentionInterface, AutoModel, BertConfig, PreTrainedModel\n"


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["fastattn", "transformers"])
def test_either_order_registers(first):
    imports = ["import sys, fastattn\n", TRANSFORMERS]
    assert run("".join(imports if first == "fastattn" else reversed(imports)) + USE) == "0"


def test_importing_fastattn_loads_neither_torch_nor_transformers():
    code = "import sys, fastattn; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert run(code) == "[]"


def test_a_failure_of_ours_does_not_end_the_import_of_transformers():
    code = (
        "import sys, warnings, fastattn\n"
        "sys.modules['fastattn.models.interface'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    {TRANSFORMERS}"
        "print([str(each.message) for each in caught if 'fastattn' in str(each.message)])\n"
    )
    assert "is not available" in run(code)
