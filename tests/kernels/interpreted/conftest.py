"""These files need Triton's interpreter, which is chosen before triton is imported.

test_interpreted.py runs each in a process of its own. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
