"""What compute-sanitizer watches: one call of each kind of kernel, mask, cache and layout, and no reference.

PyTorch's own kernels would be watched too, a hundred times slower: results are the correctness section's
matter. The sizes are that section's, so that its compiled kernels are found in the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]
ATTENTION = (
    "plain", "causal", "padding", "starts", "lengths-causal", "mask-head", "bias", "t5-padding", "t5-causal",
    "alibi-causal", "window", "window-causal", "softcap", "sinks-empty", "everything",
)  # fmt: skip
VARLEN = ("plain", "causal", "t5", "window-causal", "sinks")
DECODE = ("plain", "window", "everything")


def run_calls(draw: Any) -> Iterator[str]:
    """Make each call, then give its name."""
    import test_gpu_attention as attention
    import test_gpu_decode as decode
    import test_gpu_varlen as varlen
    import torch
    from gpu_checks import has_e4m3

    from gpu_sections.smoke import LAUNCHES

    for flags in ATTENTION:
        attention.launched(*attention.drawn(flags, draw))
        yield f"attention {flags}"
    for flags in VARLEN:
        varlen.launched(*varlen.drawn(flags, draw))
        yield f"varlen {flags}"
    stored = [torch.int8, *([torch.float8_e4m3fn] if has_e4m3(draw.device) else [])]
    for block_size in (0, 16):
        for flags in DECODE:
            decode.launched(*decode.drawn(flags, draw), block_size=block_size, draw=draw)
            yield f"decode {flags}, pages of {block_size}"
        for dtype in stored:
            *call, scales = decode.drawn_quantized("everything", dtype, draw)
            decode.launched(*call, block_size=block_size, draw=draw, scales=scales)
            yield f"decode {dtype}, pages of {block_size}"
    for launch in LAUNCHES:
        launch(draw)
        yield launch.__name__


def main() -> int:
    """Make every call and say how many there were."""
    import torch
    from gpu_checks import INTERPRETED, Draw

    device = torch.device("cpu" if INTERPRETED else "cuda")
    done = 0
    for dtype in (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16):
        for name in run_calls(Draw(torch.Generator().manual_seed(0), device, dtype)):
            if not INTERPRETED:
                torch.cuda.synchronize()
            done += 1
            print(f"done: {name} {dtype}", flush=True)
    print(f"{done} calls done")
    return 0


if __name__ == "__main__":
    sys.path[:0] = PATHS
    raise SystemExit(main())
