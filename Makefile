PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f)
CPP := $(shell find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
# of an environment's programs: two processes of one thread; the tests of a file stay in one of them,
# because they share what the file prepares
users_tests = OMP_NUM_THREADS=1 $1/pytest -n 2 --dist loadfile -m 'not slow'
# pip installs this package, and compiles nothing
without_compiling = ANCHOROPS_CUDA=0 CXX=false
DEMO ?= demo
# of make bench: where its rows and pictures go
BENCH ?= build/bench
# versions of torch that must be able to load what `make setup` compiled. For other versions of
# Python: make check-abi PYTHON=python3.13
ABI_TORCHES ?= 2.10 2.11 2.13
# of make check-torch: those of docs/install.md
TORCH ?= 2.10.0 2.12.1 2.14.1 2.15.0
# the oldest that the kernels support: that of torch 2.10
TRITON ?= 3.6.0

.PHONY: setup compiled packages test check-torch check-nnunet check-ultralytics proofs traffic faults barriers demo bench counted-memory kernels-report kernels-report-older lint format docs package check-abi clean
release_of_nnunet = nnunetv2==2.8.1
release_of_ultralytics = ultralytics==8.4.190
# or make would delete the environments that it made on the way
.PRECIOUS: build/torch/% build/abi/% build/triton/%

setup: .venv/installed

# The packages for compiling are installed first. So the extension is built with the torch that will
# load it, and can be built again without a network. It is compiled while the others are installed.
.venv/installed: pyproject.toml constraints.txt setup.py build_backend.py $(SOURCES)
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch torchvision 'setuptools>=77' ninja
	$(MAKE) -j 2 compiled packages \
	    || { echo 'make setup: an error stands above; what compilers printed, in build/setup.log'; false; }
	touch $@

# Without MAKEFLAGS, because ninja would take it as a limit; build/lib* would go into later wheels
compiled:
	mkdir -p build
	MAKEFLAGS= $(BIN)/python setup.py build_ext --inplace >build/setup.log 2>&1 || { cat build/setup.log; false; }
	rm -rf build/lib*
	@grep '^anchorops: ' build/setup.log

packages:
	$(without_compiling) $(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[train,test,dev,docs]'

test: setup
	$(call users_tests,$(BIN))

# The same with other versions of torch, in environments of their own of 7 GB each, with the libraries
# of `make setup`. If no torchvision can be installed with this torch, the training program is left
# out, and the tests that need it are skipped.
check-torch: $(TORCH:%=check-torch-%)

check-torch-%: setup build/torch/%
	$(call users_tests,build/torch/$*/bin)

build/torch/%:
	$(PYTHON) -m venv $@
	pip='$@/bin/pip install torch==$*' extras=train,test,dev,docs; \
	$$pip torchvision 'setuptools>=77' ninja \
	    || { extras=plots,diagnostics,test,dev,docs; $$pip 'setuptools>=77' ninja; } \
	    && $(without_compiling) $$pip --no-build-isolation -e ".[$$extras]" \
	    || { rm -r $@; false; }

# for changes of kernels: CUDA's in the machine for PTX (if nvcc is there), machine code, and the tests
# that take long. Three processes, because a few of them take minutes with processes of their own.
# Then Triton's kernels in the machine: all cases as compiled for sm_80; two at a time, for sm_90 and
# sm_75 a case of each kernel, and centroid InfoNCE, whose products differ there (also of 19 and 1,000
# classes); a case of each kernel as compiled by the oldest Triton; and the bytes that kernels ask for.
proofs: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal -m slow
	OMP_NUM_THREADS=1 PTX_ARCH=80 $(BIN)/pytest -n 2 --dist worksteal tests
	OMP_NUM_THREADS=1 $(MAKE) -j 2 -O machine-90 machine-75 older-80 older-75 traffic

machine-%: setup
	PTX_ARCH=$* $(BIN)/pytest -m 'not slow' -k 'every_kernel or InfoNCE or equal_bits or large and 1000' \
	    tests/test_every_kernel.py tests/test_verify.py tests/test_centroid_info_nce.py

older-%: setup build/triton/$(TRITON)
	PYTHONPATH=build/triton/$(TRITON) PTX_ARCH=$* $(BIN)/pytest tests/test_every_kernel.py

traffic: setup
	PYTHONPATH=tests/proofs:bench $(BIN)/python -m ptx.traffic

# do the tests notice each planted fault? make faults FAULTS='kernels/lanes.py C++' takes those whose
# file or name contains one of these texts
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/proofs/planted_faults.py $(FAULTS)

# does the machine for PTX notice each barrier that is taken out of Triton's and the CUDA kernels?
removed_barriers = PYTHONPATH=tests/proofs OMP_NUM_THREADS=1 $(BIN)/python -m ptx.removed_barriers
barriers: setup
	$(removed_barriers) 80
	$(removed_barriers) 90
	PTX_BACKEND=cuda $(removed_barriers) 80

# the examples for nnU-Net and Ultralytics, and nnU-Net's losses in docs/loss-map.md, against their
# releases, in environments of their own of 7 GB
check-nnunet check-ultralytics: check-%: setup build/%
	OMP_NUM_THREADS=1 build/$*/bin/pytest tests/test_$*.py tests/test_other_libraries.py

build/nnunet build/ultralytics: build/%:
	$(PYTHON) -m venv $@
	pip='$@/bin/pip install -c constraints.txt'; \
	$$pip torch torchvision 'setuptools>=77' ninja \
	    && $(without_compiling) $$pip --no-build-isolation -e '.[test]' $(release_of_$*) \
	    || { rm -r $@; false; }

demo: setup
	$(BIN)/python -m anchorops.train $(DEMO)

# more than an hour, in which nothing else may run. `make bench BENCH=bench/results` measures the
# committed rows of this device again. nnU-Net is one of the alternatives
bench: setup build/nnunet
	$(BIN)/python bench/run.py --out $(BENCH)

# needs no quiet machine and no GPU; some minutes
counted-memory: setup
	$(BIN)/python bench/counted_memory.py --out $(BENCH)/counted-memory.json
	$(BIN)/python bench/plot.py $(BENCH)/counted-memory.json

kernels-report: setup
	$(BIN)/python bench/kernels_report.py

# the same with an older Triton, which GPUs at hand may have, in a directory of its own of 600 MB
kernels-report-older: setup build/triton/$(TRITON)
	PYTHONPATH=build/triton/$(TRITON) $(BIN)/python bench/kernels_report.py --targets sm_80 sm_90 sm_100 sm_120

build/triton/%:
	$(BIN)/pip install --no-deps --target $@ triton==$* || { rm -r $@; false; }

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# the site, in site/; a broken link or a missing docstring fails
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# sdist, and a wheel for this platform and every Python, of what `make setup` compiled (tests compare
# the files of both with the repository's). The last line prints the manylinux tag that the wheel can
# have; auditwheel repair, in the release workflow, sets it
package: setup
	rm -rf dist build/lib*
	$(BIN)/python -m build --no-isolation --sdist --wheel
	$(BIN)/twine check --strict dist/*
	$(BIN)/auditwheel show dist/*.whl | grep -o 'manylinux_[0-9a-z_]*'

check-abi: setup $(ABI_TORCHES:%=build/abi/%)
	ANCHOROPS_ABI_PYTHONS='$(ABI_TORCHES:%=build/abi/%/bin/python)' \
	    $(BIN)/pytest tests/test_packaging.py -k other_torch

build/abi/%:
	$(PYTHON) -m venv $@
	$@/bin/pip install numpy 'torch==$*.*' || (rm -r $@; false)

clean:
	rm -rf build dist site *.egg-info anchorops/*.so .venv/installed
	rm -rf .benchmarks .hypothesis .pytest_cache .ruff_cache
