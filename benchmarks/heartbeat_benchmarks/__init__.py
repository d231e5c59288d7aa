"""HeartBeat benchmarks: latency per condition set, kernels, quality beside speed."""
