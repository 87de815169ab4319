# make eval | sweep | results | test | check | bench | compare | list ; everything installs itself into .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

MODEL  ?= tiny
METHOD ?= ivc_prune
RATIO  ?= 0.5
# Optional: BUDGET=layer_mean (what RATIO is a share of; default own), DATA="POPE MME", SET="layer=16",
#           MODEL_PATH=, LIMIT=, JUDGE=, DEVICE=, DTYPE=, ATTENTION=, SEED=, TIMEOUT=, ARGS=
OPTIONS = $(if $(BUDGET),--budget $(BUDGET)) \
          $(if $(DATA),--data $(DATA)) $(if $(SET),--set $(SET)) $(if $(MODEL_PATH),--model-path "$(MODEL_PATH)") \
          $(if $(LIMIT),--limit $(LIMIT)) $(if $(JUDGE),--judge $(JUDGE)) $(if $(DEVICE),--device $(DEVICE)) \
          $(if $(DTYPE),--dtype $(DTYPE)) $(if $(ATTENTION),--attention $(ATTENTION)) $(if $(SEED),--seed $(SEED)) \
          $(if $(TIMEOUT),--timeout $(TIMEOUT)) $(ARGS)

.PHONY: setup eval sweep results compare list bench test test-transformers check format smoke clean
.DEFAULT_GOAL := eval

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -c 'import sysconfig, pathlib; pathlib.Path(sysconfig.get_path("purelib"), "ivcp_cpu_torchvision.pth").write_text("import ivcp_eval.vlmeval_bridge.cpu_torchvision as fix; fix.install()\n")'
	touch $(READY)

eval: $(READY)
	@$(BIN)/ivcp eval --model $(MODEL) --method $(METHOD) --ratio $(RATIO) $(OPTIONS)

# `make eval` leaves the results of a model in one file; the same variables choose its rows. Another file is compared whole.
RESULTS ?= results/eval/$(MODEL).csv
CHOICE = $(if $(filter file,$(origin RESULTS)),--method $(METHOD) --ratio $(RATIO) --budget $(or $(BUDGET),own) \
         $(if $(SET),--set $(SET)) $(if $(LIMIT),--limit $(LIMIT)))
compare: $(READY)
	@$(BIN)/ivcp compare $(RESULTS) $(BASELINE) $(CHOICE) $(ARGS)

# Many variants on many benchmarks in one pass each; run again to continue. ARGS="--executor slurm --partition gpu ..."
SWEEP ?= sweeps/smoke.yaml
sweep: $(READY)
	@$(BIN)/ivcp sweep run $(SWEEP) $(ARGS)

# CSVs and wide tables of every sweep, from the records alone.
results: $(READY)
	@$(BIN)/ivcp sweep results $(ARGS)

list: $(READY)
	@$(BIN)/ivcp list

SIZE ?= small
bench: $(READY)
	@$(BIN)/ivcp bench pruning --size $(SIZE) $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(ARGS),$(ARGS),--ignore tests/runs/sweep/test_slurm.py)
	$(if $(ARGS),,$(BIN)/python -m pytest tests/runs/sweep/test_slurm.py)  # alone: it measures a scheduler's timing

# The hooks on another transformers: VERSION=5.14.1 | newest. Its venv lies over .venv and holds what differs.
VERSION ?= newest
OTHER   := .venv-transformers-$(VERSION)
SOME    := not test_contract or -none- or -ivc_prune- or -fastv- or -visionzip- or -toy_stages_mixed-
test-transformers: $(READY)
	[ -x $(OTHER)/bin/pip ] || $(BIN)/python -m venv $(OTHER)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo $(OTHER)/lib/python*/site-packages)/base.pth"
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --upgrade transformers$(if $(filter-out newest,$(VERSION)),==$(VERSION))
	$(OTHER)/bin/python -c 'import transformers as t; v = "$(VERSION)"; print("transformers", t.__version__); assert v in ("newest", t.__version__)'
	$(OTHER)/bin/python -m pytest -n 2 --dist worksteal tests/engine/oracle tests/engine/contract --ignore tests/engine/contract/test_mutations.py $(if $(ARGS),$(ARGS),-k "$(SOME)")

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

smoke: $(READY)
	@$(BIN)/ivcp eval --limit 4

clean:
	rm -rf $(VENV) $(VENV)-* results/runs results/cache results/eval results/sweeps
