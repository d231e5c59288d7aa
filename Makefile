# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
DEMO   := .venv-demo
DEV    := .venv
TORCH  ?= torch==2.13.0

.PHONY: demo test lint bench host clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/heartbeat sample --from phantom:7 --seed 1 --out out/clip.gif --preview out/demo.gif --json out/demo.json

test: $(DEV)/.installed
	$(DEV)/bin/python -m pytest -q

lint: $(DEV)/.installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy

bench: $(DEV)/.installed
	$(DEV)/bin/heartbeat-bench latency

# The C++ host, beside Python's clip of the same seed.
host: $(DEV)/.installed
	cmake -S examples/cpp -B out/cpp
	cmake --build out/cpp
	$(DEV)/bin/python examples/cpp/compare.py out/cpp/heartbeat_host --preview out/cpp_host.png

# The demo's environment holds the runtime only: no torch.
$(DEMO)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install -q --disable-pip-version-check -e '.[cpu,media]'
	touch $@

# torch first and pinned: a range left to the resolver may fetch gigabytes of CUDA on a CPU machine.
$(DEV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/pip install -q --disable-pip-version-check '$(TORCH)'
	$(DEV)/bin/pip install -q --disable-pip-version-check -e '.[cpu,dev]'
	touch $@

clean:
	rm -rf $(DEMO) $(DEV) out
