# Every target works on a fresh machine: the first run makes the virtual environment and installs what it needs.
#
#   make demo    exports the demo base with three adapters and transcribes the demo clips with them
#   make test    every test but soak and GPU ones
#   make check   lint, format, types, import directions
#   make soak    the long runs
#   make base    trains the tiny Whisper of the demo again: hours on two cores
#   make tables  word error rates in the papers' layout, from the domains' names: hours on two cores
#   make bench   real-time factor over the number of adapters, into build/rtf.json
#   make clean   removes everything made here but the virtual environment

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := benchmarks/demo
BUNDLE := build/demo-bundle
ADAPTERS := music weather sports

# For its vocabulary files and as a peer. Of its dependencies the tests need no triton, which is large: --no-deps.
WHISPER := openai-whisper==20250625

# Two more voices for training the tiny base. Compiled on installing: without a compiler there is everything else.
PICO := ttspico==0.3.2

# Speech engines, and the texts that the tiny base learns English from. Without them the tests that speak are skipped.
PROGRAMS := espeak-ng flite festival
PACKAGES := $(PROGRAMS) festvox-kallpc16k festvox-kdlpc16k fortunes wordnet-base wamerican

.DELETE_ON_ERROR:
.PHONY: setup voices demo base test check soak bench clean

setup: $(STAMP)

voices:
	@(type $(PROGRAMS) && test -d /usr/share/wordnet) >/dev/null 2>&1 || \
		{ test "$$(id -u)" = 0 && apt-get update -qq && \
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; } || \
		echo "Speech engines are missing. On Debian or Ubuntu: sudo apt-get install $(PACKAGES)" >&2

$(STAMP): pyproject.toml | voices
	test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it, as in: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[dev]'
	$(BIN)/python -m pip install --no-deps $(WHISPER)
	$(BIN)/python -m pip install $(PICO) || \
		echo "The voices of Pico could not be compiled; make base and a few tests need them." >&2
	touch $@

$(BUNDLE)/manifest.json: $(STAMP) $(wildcard runtime/*.py runtime/*/*.py export/*.py $(DEMO)/*/*.safetensors $(DEMO)/*/*/*.safetensors)
	$(BIN)/das-export onnx --base $(DEMO)/base $(foreach name,$(ADAPTERS),--adapter $(name)=$(DEMO)/adapters/$(name)) \
		--output $(BUNDLE) --force

demo: $(BUNDLE)/manifest.json
	$(BIN)/das-bench demo $(BUNDLE) --base $(DEMO)/base --clips $(DEMO)/audio

base: $(STAMP)
	$(BIN)/das-train base --work build/base-work --output build/base

test: $(STAMP)
	$(BIN)/pytest -m "not soak and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest tests/test_imports.py -q

soak: $(STAMP)
	$(BIN)/pytest -m soak

bench: $(STAMP)
	mkdir -p build
	$(BIN)/das-bench rtf --output build/rtf.json
	$(BIN)/das-bench report build/rtf.json

include benchmarks/tables.mk

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
