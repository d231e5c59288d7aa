"""heartbeat-bench kernels."""

import argparse

from heartbeat_benchmarks import results
from heartbeat_benchmarks.commands import options

HELP = "Triton kernels against torch, xformers and the memory roof, on a GPU"


def configure(parser: argparse.ArgumentParser) -> None:
    """Without a GPU: bytes and predicted times. --compile: for GPUs that are not here."""
    parser.add_argument("--only", default="", metavar="OP", help="operations named so")
    parser.add_argument("--compile", action="store_true", help="registers and spills, no runs")
    options.folder(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs or compiles, stores."""
    from heartbeat_benchmarks import kernels, kernels_compiled
    from heartbeat_benchmarks.fingerprint import fingerprint

    measure = kernels_compiled.run if arguments.compile else kernels.run
    result = measure(only=arguments.only)
    kind = "compiled" if arguments.compile else "kernels"
    path = results.save(kind, {"fingerprint": fingerprint(), **result}, arguments.results)
    print(f"gpu: {result['gpu']}\nraw rows: {path}")
    return 0
