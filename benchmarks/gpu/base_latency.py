"""One pass of `base`'s denoiser over 16 frames of 256×256, with and without our kernels.

In bfloat16, with random weights: time does not depend on them. Each way is first held to the eager
reference. The compiled ways run as CUDA graphs (mode "reduce-overhead"), as a denoising loop would.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heartbeat_benchmarks.kernels import IMAGE, TEXT, median_us
from heartbeat_fast.models.blocks import use_kernels
from heartbeat_fast.models.config import BASE
from heartbeat_fast.models.denoiser import Denoiser

OUT = Path(os.environ.get("OUT", "out/gpu"))


@torch.inference_mode()
def main() -> None:
    """Four ways, one table."""
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Denoiser(BASE.denoiser).eval().bfloat16()
        for parameter in model.parameters():  # layers that start at zero would hide an error
            parameter.add_(0.01 * torch.randn_like(parameter))
        inputs = denoise_inputs(model)

    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"what": "base's denoiser, 16 frames, 256x256, bfloat16, one clip", "rows": []}
    wanted: Tensor | None = None
    for kernels in ("reference", "triton"):
        for compiled in (False, True):
            use_kernels(model, kernels)
            torch.compiler.reset()
            call = partial(model.denoise, *inputs)
            if compiled:
                call = partial(torch.compile(model.denoise, mode="reduce-overhead"), *inputs)
            came = call().float()
            wanted = came if wanted is None else wanted
            error = float((came - wanted).norm() / wanted.norm())
            row = {"kernels": kernels, "compiled": compiled, "relative_error": error}
            result["rows"].append(row | {"ms": median_us(call) / 1e3 if error < 0.05 else None})
            print(result["rows"][-1], flush=True)
    (OUT / "base-latency.json").write_text(json.dumps(result, indent=1) + "\n")

    print(f"\n{result['gpu']}, ms a pass of base's denoiser")
    for compiled in (False, True):
        plain, ours = (r["ms"] for r in result["rows"] if r["compiled"] == compiled)
        how = "compiled, CUDA graph" if compiled else "eager"
        share = f"{100 * (1 - ours / plain):.1f} % less" if plain and ours else "wrong"
        print(f"{how:22} reference {plain or float('nan'):8.2f}  kernels {ours or 0:8.2f}  {share}")


def denoise_inputs(model: Denoiser) -> tuple[Any, ...]:
    """Latents, time embedding, local share, keys and values of text and image tokens."""
    config, kind = model.config, torch.bfloat16
    z = torch.randn(1, 16, config.latent_channels, 32, 32, dtype=kind)
    local = torch.randn(1, 16, config.local_channels, 32, 32, dtype=kind)
    text, image = (torch.randn(1, t, config.context_dim, dtype=kind) for t in (TEXT, IMAGE))
    temb = model.time(torch.tensor([500], device=z.device))
    return z, temb, model.local_share(local), model.context(text, image)


if __name__ == "__main__":
    main()
