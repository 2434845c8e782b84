# make experiments   set up, run the MNIST notebook from top to bottom, print its table
# make fashion       the same for FashionMNIST
# make omniglot      the same for Omniglot, one-shot recognition; ALPHABETS=5 takes the first alphabets only
# make results       run every experiment over three seeds on all data; write the tables into README and docs
# make test          set up, lint, check types, run all tests
# make check         the same without the slow tests: in a minute and a half, for every day
# make coverage      run the tests, and say which lines and branches of the six modules they reach
# make benchmark     time selection, its growth and shares, an epoch, chunks, retrieval; tables into README and docs
# make benchmark-gpu time selection on a GPU, in four minutes; write the table into docs
# make precision     train the MNIST experiments in bfloat16; write the table into docs
# make movies        train for three epochs on MNIST; write the README's moving pictures
# make lab           open the notebooks in Jupyter
#
# DATA_ROOT (default data/) is where data sets are looked for and downloaded to; EPOCHS=1 gives a quick run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DATA_ROOT ?= data
export EPOCHS ?= 20

.PHONY: experiments fashion omniglot results test check coverage benchmark benchmark-gpu precision movies picture lab clean

# glibc then keeps the memory that a batch frees instead of fetching it anew for the next: a training step of 250 images
# took 41 to 48 ms on two threads with this, 48 to 70 ms without.
experiments fashion omniglot results precision movies: export MALLOC_MMAP_THRESHOLD_ ?= 2000000000
experiments fashion omniglot results precision movies: export MALLOC_TRIM_THRESHOLD_ ?= 4000000000

experiments: $(VENV)/.installed
	$(BIN)/python scripts/run_notebook.py Experiments_MNIST.ipynb runs/mnist

fashion: $(VENV)/.installed
	$(BIN)/python scripts/run_notebook.py Experiments_FashionMNIST.ipynb runs/fashion_mnist

omniglot: $(VENV)/.installed
	$(BIN)/python scripts/run_notebook.py Experiments_Omniglot.ipynb runs/omniglot

results: $(VENV)/.installed
	$(BIN)/python scripts/reproduce.py

test check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadgroup $(if $(filter check,$@),-m "not slow")

coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

benchmark: $(VENV)/.installed-dev
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/selection.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/scaling.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/shares.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/epoch.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/chunks.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/retrieval.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/large_sets.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/readme.py

benchmark-gpu: $(VENV)/.installed-dev
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/selection_gpu.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/readme.py

precision: $(VENV)/.installed-dev
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/precision.py
	PYTHONPATH=.:scripts $(BIN)/python benchmarks/readme.py

movies: $(VENV)/.installed
	PYTHONPATH=.:scripts $(BIN)/python scripts/movies.py

picture: $(VENV)/.installed-dev
	$(BIN)/python scripts/page_picture.py runs/mnist/embeddings.html images/mnist_page.png

lab: $(VENV)/.installed
	$(BIN)/jupyter lab

$(VENV)/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs .pytest_cache .ruff_cache .coverage*
