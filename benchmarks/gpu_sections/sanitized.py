"""What compute-sanitizer watches: one call of each kind of kernel, mask, cache and layout, and no reference.

PyTorch's own kernels would be watched too, a hundred times slower: results are the correctness section's
matter. The sizes are that section's, so that its compiled kernels are found in the cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
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
# Positions a page; 0 is a contiguous cache.
PAGES = (0, 16)


def attention(flags: str, draw: Any) -> None:
    import test_gpu_attention

    test_gpu_attention.launched(*test_gpu_attention.drawn(flags, draw))


def varlen(flags: str, draw: Any) -> None:
    import test_gpu_varlen

    test_gpu_varlen.launched(*test_gpu_varlen.drawn(flags, draw))


def decode(flags: str, block_size: int, draw: Any) -> None:
    import test_gpu_decode

    test_gpu_decode.launched(*test_gpu_decode.drawn(flags, draw), block_size=block_size, draw=draw)


def decode_quantized(dtype: Any, block_size: int, draw: Any) -> None:
    import test_gpu_decode

    *call, scales = test_gpu_decode.drawn_quantized("everything", dtype, draw)
    test_gpu_decode.launched(*call, block_size=block_size, draw=draw, scales=scales)


def calls(draw: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    """Each call and its name."""
    import torch

    from gpu_sections.smoke import LAUNCHES

    stored = (torch.int8, torch.float8_e4m3fn)
    return [
        *((f"attention {flags}", partial(attention, flags)) for flags in ATTENTION),
        *((f"varlen {flags}", partial(varlen, flags)) for flags in VARLEN),
        *((f"decode {flags}, {size}", partial(decode, flags, size)) for flags in DECODE for size in PAGES),
        *(
            (f"decode {each}, {size}", partial(decode_quantized, each, size))
            for each in stored
            for size in PAGES
        ),
        *((launch.__name__, launch) for launch in LAUNCHES),
    ]


def main(argv: list[str] | None = None) -> int:
    """Make every call, or every N-th, and say how many there were."""
    import torch
    from gpu_checks import INTERPRETED, Draw

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    done = 0
    for dtype in (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16):
        draw = Draw(torch.Generator().manual_seed(0), device, dtype)
        for name, call in calls(draw)[:: arguments.every]:
            call(draw)
            if not INTERPRETED:
                torch.cuda.synchronize()
            done += 1
            print(f"done: {name} {dtype}", flush=True)
    print(f"{done} calls done")
    return 0


if __name__ == "__main__":
    sys.path[:0] = PATHS
    raise SystemExit(main())
