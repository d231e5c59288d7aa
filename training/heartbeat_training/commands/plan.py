"""`heartbeat-train plan`: does a stage of the paper's model fit the GPU, and how?"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heartbeat_training.memory import MemoryPlan

HELP = "memory and work of a stage of base, by arithmetic: which micro-batch fits the GPU"
BATCHES = {"stage1": 64, "stage2": 16, "cmr": 16, "student": 16}
EXAMPLES = {"stage1": 793 * 16, "stage2": 793, "cmr": 50}  # the paper's training data


def configure(parser: argparse.ArgumentParser) -> None:
    """The stage, the machine and the way to train on it."""
    parser.add_argument("--preset", choices=["base"], default="base")
    parser.add_argument("--stage", choices=["1", "2", "cmr", "student"], default="2")
    parser.add_argument("--batch", type=int, help="the paper's: 64 in stage 1, 16 in stage 2")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-memory", type=float, default=48.0, metavar="GIB")
    parser.add_argument(
        "--sharding",
        choices=["none", "ddp", "fsdp"],
        default="none",
        help="several GPUs: everything on each (none, ddp), or spread over them (fsdp)",
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks")
    parser.add_argument("--micro-batch", type=int, default=0, metavar="ROWS", help="0: what fits")
    parser.add_argument("--train-cross-attention", action="store_true", help="in stage 2")
    parser.add_argument("--examples", type=int, help="images, clips or volumes of an epoch")
    parser.add_argument(
        "--tflops", type=float, default=60.0, help="assumed speed of a GPU, 10¹² FLOP/s (60)"
    )
    parser.add_argument("--json", action="store_true", help="bytes and FLOP as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; exit code 1 if it does not fit."""
    import json

    from heartbeat_fast.models.config import PRESETS
    from heartbeat_training.memory import Request, plan

    stage = f"stage{arguments.stage}" if arguments.stage in ("1", "2") else arguments.stage
    request = Request(
        stage=stage,
        batch=arguments.batch or BATCHES[stage],
        gpus=arguments.gpus,
        sharding=arguments.sharding,
        checkpointing=arguments.checkpointing,
        gpu_memory=arguments.gpu_memory,
        train_cross_attention=arguments.train_cross_attention,
        micro_batch=arguments.micro_batch,
    )
    found = plan(PRESETS[arguments.preset], request)
    steps, of = _steps(stage, request.batch, arguments.examples)
    flop = found.step_flop
    if stage == "student":
        from heartbeat_training.stage_student import BEFORE

        flop += BEFORE * found.row_flop * request.batch
    hours = steps * flop / (arguments.tflops * 1e12) / 3600
    if arguments.json:
        estimate = {"steps": steps, "assumed_tflops": arguments.tflops, "gpu_hours": hours}
        print(json.dumps({**found.as_dict(), "estimate": estimate}, indent=1))
    else:
        print(describe(found))
        print(
            f"Work: {flop / 1e12:.0f} TFLOP a step, {steps} steps{of}. At an assumed "
            f"{arguments.tflops:g} TFLOP/s per GPU that is {hours:.0f} GPU-hours: arithmetic, "
            "not a measurement."
        )
    return 0 if found.fits else 1


def _steps(stage: str, batch: int, examples: int | None) -> tuple[int, str]:
    """How many steps a stage has, and what of."""
    from heartbeat_training.recipes import PAPER, paper_recipe

    if stage == "student":
        from heartbeat_training.few_steps import BASE

        return BASE.student.steps, ""
    recipe = paper_recipe(PAPER[stage], examples or EXAMPLES[stage])
    epochs = recipe.published.epochs
    return epochs * -(-recipe.examples // batch), f" ({epochs} epochs of {recipe.examples})"


def describe(plan: "MemoryPlan") -> str:
    """The plan as text, memory in GiB."""
    from heartbeat_training.memory import GIB

    request, memory = plan.request, plan.memory
    lines = [
        f"base {request.stage}, batch {request.batch} on {request.gpus} GPU(s) of "
        f"{request.gpu_memory:g} GiB, sharding {request.sharding}, checkpointing "
        f"{'on' if request.checkpointing else 'off'}, bf16 autocast. By arithmetic.",
        f"Trained: {_parameters(plan.trainable)}",
        f"Frozen:  {_parameters(plan.frozen)}",
        f"Memory of a GPU at its fullest, micro-batch {plan.micro_batch}:",
    ]
    rows = {
        "weights, float32, frozen ones too": memory.weights,
        "gradients": memory.gradients,
        "Adam's two moments": memory.moments,
        "average of the weights (EMA)": memory.average,
        "gathered layers or buckets": memory.gathered,
        "bfloat16 copies of weights": memory.weight_copies,
        "batch": memory.inputs,
        f"activations, {plan.row_activations / GIB:.2f} a row": memory.activations,
        "temporary": memory.temporary,
        "allowance: CUDA itself, fragmentation": memory.allowance,
        "total": memory.total,
    }
    lines += [f"  {name:<40} {size / GIB:7.2f} GiB" for name, size in rows.items()]
    lines.append(
        "Latents and image embeddings are read from disk: VAE and MedSAM do not run in a step."
    )
    totals = ", ".join(f"{m}: {size / GIB:.1f}" for m, size in plan.totals.items())
    lines.append(f"Total by micro-batch, GiB: {totals}.")
    return "\n".join([*lines, verdict(plan)])


def verdict(plan: "MemoryPlan") -> str:
    """Whether it fits, and what to do if not."""
    from heartbeat_training.memory import GIB

    request, total = plan.request, plan.memory.total / GIB
    if plan.fits:
        return (
            f"Fits: {total:.1f} of {request.gpu_memory:g} GiB; batch {request.batch} = "
            f"{request.gpus} GPU(s) x micro-batch {plan.micro_batch} x {plan.accumulation} "
            "accumulated."
        )
    ways = [] if request.checkpointing else ["--checkpointing"]
    ways += [] if request.sharding == "fsdp" else ["--sharding fsdp with more --gpus"]
    ways += ["--micro-batch 1"] if plan.micro_batch > 1 else []
    advice = f" Try {' or '.join(ways)}." if ways else " Wanted: more GPUs or larger ones."
    return f"Does not fit: {total:.1f} of {request.gpu_memory:g} GiB.{advice}"


def _parameters(counts: dict[str, int]) -> str:
    """Millions by module."""
    each = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items())
    return f"{sum(counts.values()) / 1e6:.2f} million parameters ({each})"
