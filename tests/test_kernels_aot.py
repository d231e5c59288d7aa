"""Kernels compiled for GPUs that are not here: no spills, 16-byte accesses, PTX for a plugin.

All of the matrix for spills; a part of it, case by case, for how wide its accesses are.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing can be compiled", allow_module_level=True)

from heartbeat_benchmarks.kernels_compiled import cases, run  # noqa: E402
from heartbeat_kernels import aot, temporal_attention  # noqa: E402
from heartbeat_kernels.checks import KernelError  # noqa: E402
from heartbeat_kernels.tuning import Launch  # noqa: E402

MAKERS = dict(cases())
SOME = [
    ("temporal_attention/40", torch.bfloat16, 90),
    ("temporal_attention/80", torch.bfloat16, 90),
    ("temporal_attention/160", torch.float16, 80),
    ("dual_cross_attention/160", torch.float16, 80),
    ("temporal_attention/32", torch.float32, 90),
    ("temporal_attention_backward/80", torch.bfloat16, 90),
    ("dual_cross_attention/40", torch.bfloat16, 90),
    ("dual_cross_attention-shared/32", torch.float16, 80),
    ("dual_cross_attention-text/64", torch.bfloat16, 80),
    ("temporal_block/64", torch.bfloat16, 90),
    ("groupnorm_silu-nchw/320", torch.bfloat16, 80),
    ("geglu/1280", torch.float16, 90),
]


@pytest.mark.parametrize(("name", "dtype", "sm"), SOME, ids=lambda v: str(v).split(".")[-1])
def test_compiles_without_spills_and_with_wide_accesses(
    name: str, dtype: torch.dtype, sm: int
) -> None:
    made = MAKERS[name](dtype, sm)
    assert made.spills == 0
    assert 0 < made.registers <= 255
    assert made.architecture == {80: "sm_80", 90: "sm_90a"}[sm]
    stores, wide_stores = made.count("st.global")
    loads, wide_loads = made.count("ld.global")
    assert 0 < wide_stores == stores
    narrow = loads - wide_loads
    if "norm" in name or "block" in name:  # parameters of a channel are read one by one
        assert wide_loads > 8
    else:  # so is the tail of 77 tokens, by some threads
        assert narrow <= (4 if "cross" in name else 0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_matrix_compiles_without_a_spill() -> None:
    """Kernel × head dim or width × dtype × architecture: about four minutes of two cores."""
    rows = run(say=lambda line: None)["rows"]
    assert len(rows) == len(MAKERS) * 3 * 2 == 192
    assert [row for row in rows if row["spilt_bytes"]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)
    frames = [row for row in rows if row["case"].startswith("temporal_attention/")]
    assert len(frames) == 5 * 3 * 2
    assert all(row["loads_16_bytes"] == row["loads"] > 0 for row in frames)
    assert all(row["stores_16_bytes"] == row["stores"] > 0 for row in frames)


def test_ptx_has_pointers_only_in_the_order_a_plugin_passes_them(tmp_path: Path) -> None:
    made = aot.dual_cross_attention((2, 64, 64), (77, 16), 2, torch.float16, 80, shared=True)
    assert made.arguments == ("q_ptr", "k_ptr", "v_ptr", "ki_ptr", "vi_ptr", "out_ptr")
    entry = re.search(r"\.entry (\w+)\((.*?)\)", made.ptx, re.DOTALL)
    assert entry is not None
    assert entry[1] == made.name
    parameters = entry[2].split(",")
    assert len(parameters) == len(made.arguments)  # Triton's two scratch pointers are gone
    assert all(".u64 .ptr .global" in p for p in parameters)
    assert made.grid == (2 * 1 * 2, 1, 1)
    ptx, parameters_json = made.save(tmp_path, "cross")
    written = json.loads(parameters_json.read_text())
    assert written["block"] == made.block == 32 * 4
    assert aot.assemble(ptx.read_text(), "sm_80") == (made.registers, made.spills)


def test_absent_branch_costs_nothing() -> None:
    both = MAKERS["dual_cross_attention/40"](torch.bfloat16, 90)
    alone = MAKERS["dual_cross_attention-text/40"](torch.bfloat16, 90)
    assert alone.arguments == ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    for access in ("ld.global", "mma"):
        assert alone.count(access)[0] < 0.7 * both.count(access)[0]
    assert alone.registers < both.registers


def test_what_a_plugin_cannot_pass_is_refused() -> None:
    launch = Launch(4, 4)
    values = temporal_attention.constants(16, 8, 2, 32, 2, launch)
    values |= dict.fromkeys("QKV", (1, 1, 1))  # Y's strides are missing: a scalar would be left
    with pytest.raises(KernelError, match="Y must be constants"):
        aot.build(temporal_attention.forward_kernel, values, torch.half, 80, (1, 1, 1), launch)
    with pytest.raises(KernelError, match="ptxas refuses"):
        aot.assemble("not PTX", "sm_80")
    used = ".visible .entry k(\n.param .u64 k_0,\n.param .u64 k_1\n)\n{ ld.param.u64 %r, [k_1]; }"
    with pytest.raises(KernelError, match="k_1 is used"):
        aot.without_scratch(used, 1)
