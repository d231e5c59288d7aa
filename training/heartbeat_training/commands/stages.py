"""`heartbeat-train codec | texture | stage1 | stage2 | all`: one stage of training, or all."""

import argparse
from pathlib import Path

HELPS = {
    "codec": "train the codec: frames ↔ latents",
    "texture": "train its decoder alone, for speckle",
    "stage1": "train the denoiser on single frames",
    "stage2": "train what sees time, on clips",
    "all": "the four in turn",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of every stage."""
    parser.add_argument("--preset", choices=["nano", "tiny"], default="tiny")
    parser.add_argument("--run", dest="folder", type=Path, default=Path("runs/tiny"), metavar="DIR")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--train-cross-attention",
        action="store_true",
        help="stage 2 also trains cross-attention (the paper's figure; its text freezes it)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="real clips instead of phantoms")
    parser.add_argument("--patients", type=int, metavar="N", help="only the first N of them")
    parser.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="keep the last N patients out of every stage (default: the data set's test list)",
    )
    parser.add_argument("--view", choices=["2CH", "4CH"], help="CAMUS: only this view")
    parser.add_argument("--init", type=Path, metavar="DIR", help="model folder to start from")


def run(arguments: argparse.Namespace) -> None:
    """Train; an interrupted run goes on where it was."""
    import torch

    from heartbeat_training.pipeline import STAGES, run_stage
    from heartbeat_training.real_data import RealData

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    data = None
    if arguments.data:
        data = RealData(arguments.data, arguments.hold_out, arguments.patients, arguments.view)
    stages = STAGES if arguments.command == "all" else (arguments.command,)
    for stage in stages:
        run_stage(
            stage,
            arguments.preset,
            arguments.folder,
            train_cross_attention=arguments.train_cross_attention,
            data=data,
            init=arguments.init,
        )
