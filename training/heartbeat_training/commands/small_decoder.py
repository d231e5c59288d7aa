"""`heartbeat-train small-decoder`: distil a published autoencoder's decoder, and judge it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heartbeat_training import hardware

if TYPE_CHECKING:
    from heartbeat_fast.models.codec import Codec
    from heartbeat_training.small_decoder import Task

HELPS = {"small-decoder": "distil a small grey decoder from a published autoencoder; judge it"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "--vae", type=Path, required=True, metavar="DIR", help="the autoencoder (docs/weights.md)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="real clips")
    parser.add_argument("--view", choices=["2CH", "4CH"], help="CAMUS: only this view")
    parser.add_argument(
        "--hold-out", type=int, default=0, metavar="N", help="the last N patients (default: lists)"
    )
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR")
    parser.add_argument("--start", type=Path, metavar="DIR", help="TAESD's decoder to start from")
    parser.add_argument("--width", type=int, default=32, help="channels of every layer (32)")
    parser.add_argument("--size", type=int, default=256, help="side of the frames (256)")
    parser.add_argument("--crop", type=int, default=128, help="side of what is learned from (128)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8, help="crops a step (8)")
    parser.add_argument("--cases", type=int, metavar="N", help="judge the first N clips only")
    parser.add_argument("--frames", type=int, default=16, help="of a judged clip (16)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json", help="figures (default: RUN/figures.json)"
    )
    hardware.add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Distil, save, judge, print; an interrupted run goes on where it was."""
    import numpy as np
    import torch
    from rich.console import Console

    from heartbeat_fast.models.autoencoders import open_autoencoder, save_small_decoder
    from heartbeat_training import real_data, small_decoder
    from heartbeat_training.loop import Recipe
    from heartbeat_training.processes import join

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    console = Console(stderr=True, quiet=join()[0] > 0)
    teacher = open_autoencoder(arguments.vae)
    data = real_data.RealData(arguments.data, arguments.hold_out, None, arguments.view)
    kept = arguments.folder / f"frames-{arguments.size}.npy"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept.with_name(".part.npy"), real_data.plain_frames(data, arguments.size))
        kept.with_name(".part.npy").rename(kept)
    task = small_decoder.Task(arguments.width, arguments.crop, start=arguments.start)
    recipe = Recipe(arguments.steps, arguments.batch, lr=1e-3, warmup=50, ema=0.99)
    student = small_decoder.distil_decoder(
        teacher,
        np.load(kept, mmap_mode="r"),
        task,
        recipe,
        arguments.folder,
        console,
        hardware.from_options(arguments),
    )
    if join()[0]:
        return
    channels = int(student.decoder.layers[0].in_channels)
    about = {"latent_channels": channels, "widths": [arguments.width] * 4}
    save_small_decoder(student.decoder, arguments.folder / "small-decoder", about)
    _judge(arguments, (teacher, student.eval()), task, channels, console)


def _judge(
    arguments: argparse.Namespace,
    codecs: "tuple[Codec, Codec]",
    task: "Task",
    channels: int,
    console: Any,
) -> None:
    """Figures on the held-out clips, printed and written."""
    from dataclasses import asdict

    from rich.progress import track

    from heartbeat_benchmarks.fingerprint import fingerprint
    from heartbeat_training import small_decoder
    from heartbeat_training.evaluation import options
    from heartbeat_training.evaluation.cases import open_cases

    folder = arguments.folder
    cases, refused = open_cases(
        str(arguments.data),
        frames=arguments.frames,
        size=arguments.size,
        hold_out=arguments.hold_out,
        limit=arguments.cases,
    )
    costs = [small_decoder.cost(codec, channels, arguments.size) for codec in codecs]
    rows = [
        small_decoder.judge(*codecs, [case])[0]
        for case in track(cases, "held-out clips", console=console, transient=True)
    ]
    found = small_decoder.summary(rows)
    small_decoder.picture(*codecs, cases[:: max(len(cases) // 3, 1)][:3], folder / "picture.png")
    workload = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(task).items()}
    workload |= {"vae": arguments.vae.name, "data": arguments.data.name, "refused": refused}
    workload |= {key: getattr(arguments, key) for key in ("hold_out", "steps", "batch", "size")}
    content = {"fingerprint": fingerprint(), "workload": workload, "figures": found, "rows": rows}
    content["cost"] = dict(zip(("teacher", "student"), costs, strict=True))
    path = options.save("decoder", content, arguments.out or folder / "figures.json")
    share = costs[1]["multiply_adds"] / costs[0]["multiply_adds"]
    console.print(f"{share:.3f} of the multiply-adds; {len(cases)} held-out clips", highlight=False)
    for name, value in found.items():
        interval = f" ({value['low']:.3f} to {value['high']:.3f})" if "low" in value else ""
        console.print(f"  {name:<24} {value['mean']:8.3f}{interval}", highlight=False)
    console.print(f"raw rows: {path}; picture: {folder / 'picture.png'}", highlight=False)
