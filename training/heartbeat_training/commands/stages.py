"""`heartbeat-train codec | texture | stage1 | stage2 | student | decoder | cmr | all`: stages.

Presets nano and tiny are ours, on phantoms or real data; base is the paper's, on real data.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from heartbeat_fast.errors import HeartBeatError
from heartbeat_training import hardware

if TYPE_CHECKING:
    from heartbeat_training.real_data import RealData

HELPS = {
    "codec": "train the codec: frames ↔ latents",
    "texture": "train its decoder alone, for speckle; on real data the last stage",
    "stage1": "train the denoiser on single frames",
    "stage2": "train what sees time, on clips",
    "student": "distil the denoiser to 1, 2 and 4 steps (base too: from stage 2 or --init)",
    "decoder": "distil a smaller decoder (base too, of Stable Diffusion's)",
    "cmr": "tune an echo model on a few short-axis volumes, mask only (base)",
    "all": "the four in turn; base: stage1 and stage2",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every stage."""
    parser.add_argument("--preset", choices=["nano", "tiny", "base"], default="tiny")
    parser.add_argument("--run", dest="folder", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--train-cross-attention",
        action="store_true",
        help="stage 2 also trains cross-attention (the paper's figure; its text freezes it)",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, metavar="X", help="nano, tiny: this share of the steps"
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="model folder to start from")
    data = parser.add_argument_group("real data (docs/data.md)")
    data.add_argument("--data", type=Path, metavar="DIR", help="real clips instead of phantoms")
    data.add_argument("--view", choices=["2CH", "4CH"], help="CAMUS: only this view")
    data.add_argument("--patients", type=int, metavar="N", help="only the first N of them")
    data.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="keep the last N patients out of every stage (default: the data set's test list)",
    )
    base = parser.add_argument_group("base (docs/weights.md)")
    base.add_argument("--sd15", type=Path, metavar="PATH", help="Stable Diffusion 1.5")
    base.add_argument("--medsam", type=Path, metavar="PATH", help="MedSAM ViT-B")
    base.add_argument(
        "--taesd", type=Path, metavar="PATH", help="decoder: begin as this one (docs/weights.md)"
    )
    base.add_argument(
        "--steps", type=int, metavar="N", help="student, decoder: instead of 8000 and 20000"
    )
    base.add_argument("--epochs", type=int, metavar="N", help="instead of the paper's 200")
    hardware.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train; an interrupted run goes on where it was."""
    import torch

    from heartbeat_training.real_data import RealData

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data = None
    if arguments.data:
        data = RealData(arguments.data, arguments.hold_out, arguments.patients, arguments.view)
    if arguments.preset == "base":
        _run_paper(arguments, data)
        return
    from heartbeat_training.pipeline import STAGES, STAGES_REAL, run_stage

    if arguments.command == "cmr":
        raise HeartBeatError("cmr: only with --preset base")
    every = STAGES_REAL if data else STAGES
    for stage in every if arguments.command == "all" else (arguments.command,):
        run_stage(
            stage,
            arguments.preset,
            arguments.folder,
            train_cross_attention=arguments.train_cross_attention,
            data=data,
            init=arguments.init,
            hardware=hardware.from_options(arguments),
            share=arguments.share,
        )


def _run_paper(arguments: argparse.Namespace, data: "RealData | None") -> None:
    from heartbeat_fast.models.heartbeat import HeartBeat
    from heartbeat_fast.text import Tokenizer
    from heartbeat_training.paper import open_base
    from heartbeat_training.paper_run import run_paper_stage
    from heartbeat_training.recipes import PAPER

    if arguments.command in ("student", "decoder"):
        _run_fast(arguments, data)
        return
    if data is None:
        raise HeartBeatError("base is trained on real data: give --data DIR")
    if arguments.command not in (*PAPER, "all"):
        raise HeartBeatError(
            f"{arguments.command}: base's codec is Stable Diffusion's, and frozen; wanted "
            f"{', '.join(PAPER)}, student, decoder or all"
        )

    def start() -> tuple[HeartBeat, Tokenizer]:
        if arguments.init:
            tokenizer = Tokenizer.open(arguments.init / "tokenizer.json")
            return HeartBeat.from_pretrained(arguments.init), tokenizer
        if not (arguments.sd15 and arguments.medsam):
            raise HeartBeatError("base starts from --sd15 and --medsam, or a model folder: --init")
        return open_base(arguments.sd15, arguments.medsam)

    stages = ("stage1", "stage2") if arguments.command == "all" else (arguments.command,)
    for stage in stages:
        published = replace(
            PAPER[stage],
            train_cross_attention=arguments.train_cross_attention,
            epochs=arguments.epochs or PAPER[stage].epochs,
        )
        chosen = hardware.from_options(arguments)
        run_paper_stage(stage, arguments.folder, data, published, start, chosen)


def _run_fast(arguments: argparse.Namespace, data: "RealData | None") -> None:
    """Base's student, or its small decoder."""
    from heartbeat_training.few_steps import BASE
    from heartbeat_training.paper_run import run_fast_stage

    recipes = BASE
    if arguments.steps:
        stage = arguments.command
        shorter = replace(getattr(BASE, stage), steps=arguments.steps)
        recipes = replace(BASE, **{stage: shorter})
    run_fast_stage(
        arguments.command,
        arguments.folder,
        data,
        recipes,
        teacher=arguments.init,
        start=arguments.taesd,
        hardware=hardware.from_options(arguments),
    )
