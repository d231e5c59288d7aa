"""HeartBeat export: graphs, ONNX, sampler tables, parity, fingerprints."""
