# make eval | sweep | results | test | check | bench | compare | report | list ; everything installs itself into .venv on first use.
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

.PHONY: setup lock eval sweep results compare report list bench test test-transformers test-quantised check format smoke clean
.DEFAULT_GOAL := eval

setup: $(READY)

# Every file's hash is checked. What a distribution builds from source is built by the locked setuptools, hence first.
# torch is the build that pip gets on the machine (with hashes to check it would prefer the index's CUDA build), then checked.
# TORCH=FILE installs another build of the locked version, unchecked.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps
LOCKED  := $(INSTALL) --require-hashes --no-build-isolation --requirement
$(READY): requirements.lock requirements-cuda.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > $(VENV)/build.lock
	$(LOCKED) $(VENV)/build.lock
	sed -n '/^torch==/,/[^\\]$$/p' requirements.lock > $(VENV)/torch.lock
	$(if $(TORCH),,$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/torch "$$(grep -o '^torch==[^ ]*' $(VENV)/torch.lock)")
	$(if $(TORCH),$(INSTALL) "$(TORCH)",$(LOCKED) $(VENV)/torch.lock --no-index --find-links $(VENV)/torch)
	rm -rf $(VENV)/torch
	$(LOCKED) requirements.lock
	if $(BIN)/python -c 'from importlib.metadata import requires; exit("nvidia-" not in str(requires("torch")))'; then $(LOCKED) requirements-cuda.lock; fi
	$(INSTALL) --no-build-isolation --editable .
	$(BIN)/python -c 'import sysconfig, pathlib; pathlib.Path(sysconfig.get_path("purelib"), "ivcp_cpu_torchvision.pth").write_text("import ivcp_eval.vlmeval_bridge.cpu_torchvision as fix; fix.install()\n")'
	touch $(READY)

# Writes both lock files anew for what pyproject.toml asks; pins stay where they can. UPGRADE="--upgrade" or "--upgrade-package NAME".
# The torch that this machine's pip gets may be a build that the index lacks (a CPU build): its hash is added.
LOCK_VENV := .venv-lock
lock:
	[ -x $(LOCK_VENV)/bin/uv ] || { $(PYTHON) -m venv $(LOCK_VENV) && $(LOCK_VENV)/bin/pip install --quiet --disable-pip-version-check uv; }
	cat requirements.lock requirements-cuda.lock > $(LOCK_VENV)/lock
	$(LOCK_VENV)/bin/uv pip compile --quiet pyproject.toml --extra vlmeval --extra slurm --extra report --extra dev --group lock --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate $(UPGRADE) --output-file $(LOCK_VENV)/lock
	rm -rf $(LOCK_VENV)/torch
	$(LOCK_VENV)/bin/pip download --quiet --disable-pip-version-check --no-deps --dest $(LOCK_VENV)/torch "$$(grep -o '^torch==[^ ]*' $(LOCK_VENV)/lock)"
	$(LOCK_VENV)/bin/python .ci/split_lock.py $(LOCK_VENV)/lock $(LOCK_VENV)/torch/*

eval: $(READY)
	@$(BIN)/ivcp eval --model $(MODEL) --method $(METHOD) --ratio $(RATIO) $(OPTIONS)

# `make eval` leaves the results of a model in one file; the same variables choose its rows: without SET the method's usual
# parameters, without LIMIT whole benchmarks. Another file is compared whole.
RESULTS ?= results/eval/$(MODEL).csv
CHOICE = $(if $(filter file,$(origin RESULTS)),--method $(METHOD) --ratio $(RATIO) --budget $(or $(BUDGET),own) \
         --set $(SET) --limit $(or $(LIMIT),0) $(if $(DATA),--data $(DATA)) $(if $(SEED),--seed $(SEED)) \
         $(if $(DTYPE),--dtype $(DTYPE)) $(if $(ATTENTION),--attention $(ATTENTION)) $(if $(DEVICE),--device $(DEVICE)))
compare: $(READY)
	@$(BIN)/ivcp compare $(RESULTS) $(BASELINE) $(CHOICE) $(ARGS)

# One HTML file of RESULTS: verdict (MARGIN=1), plots, flips, pictures, costs. ARGS="--policy FILE --figures DIR --out FILE"
report: $(READY)
	@$(BIN)/ivcp report $(RESULTS) $(BASELINE) $(if $(MARGIN),--margin $(MARGIN)) $(ARGS)

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
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(ARGS),$(ARGS),--ignore tests/runs/executors/test_slurm.py)
	$(if $(ARGS),,$(BIN)/python -m pytest tests/runs/executors/test_slurm.py)  # alone: it measures a scheduler's timing

# The hooks on another transformers: VERSION=5.14.0 | newest. Its venv lies over .venv and holds what differs.
VERSION ?= newest
OTHER   := .venv-transformers-$(VERSION)
CHECKS  := ratio_one or prefill_equals or decode_equals or manual_decoding or second_turn or cache_lengths or batch_equals or beams or prompt_lookup
METHODS := -none- or -ivc_prune- or -fastv- or -visionzip- or -toy_stages_mixed- or -toy_clips-
test-transformers: $(READY)
	[ -x $(OTHER)/bin/pip ] || $(BIN)/python -m venv $(OTHER)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' > "$$(echo $(OTHER)/lib/python*/site-packages)/base.pth"
	$(OTHER)/bin/pip install --quiet --disable-pip-version-check --upgrade transformers$(if $(filter-out newest,$(VERSION)),==$(VERSION))
	$(OTHER)/bin/python -c 'import transformers as t; v = "$(VERSION)"; print("transformers", t.__version__); assert v in ("newest", t.__version__)'
	$(OTHER)/bin/python -m pytest -n 2 --dist worksteal tests/engine/oracle tests/engine/contract tests/engine/test_fork.py tests/methods/test_oracles.py --ignore tests/engine/contract/test_mutations.py \
	  $(if $(ARGS),$(ARGS),-k "not test_contract or (($(CHECKS)) and ($(METHODS)))")

# Weights in 8 and 4 bits need torchao, which every import of transformers would load, and which has much to say then; and
# bitsandbytes, whose tests run on a CPU, slowly.
TORCHAO := .venv-torchao
test-quantised: $(READY)
	[ -x $(TORCHAO)/bin/pip ] || $(BIN)/python -m venv $(TORCHAO)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' > "$$(echo $(TORCHAO)/lib/python*/site-packages)/base.pth"
	$(TORCHAO)/bin/pip install --quiet --disable-pip-version-check --no-deps torchao==0.18.0 bitsandbytes==0.50.2
	$(TORCHAO)/bin/python -m pytest -q tests/runs/answering/test_quantising.py tests/lab/bench/test_quantised.py

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
