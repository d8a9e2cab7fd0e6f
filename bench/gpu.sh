#!/usr/bin/env bash
# Everything that needs a GPU, in three calls of at most ten minutes each:
#
#     bench/gpu.sh [--out DIR] [--wheels DIR] [--dry-run] [first|second|third]...
#
# first: values, bandwidths, CUDA tests, each kernel next to the least possible time, the largest
# kernels in ncu, sanitizers. second: the same of Triton, a compiled step. third: benchmarks,
# training steps, the training program. Without a name, all three run, one after the other.
#
# Each part has a time limit, and writes its results to DIR (build/gpu) at once. If a part fails,
# this is recorded and the others still run; the exit status is the number of failed parts. DIR
# receives summary.jsonl (a line for each part), log.txt (what the parts print), kernels.jsonl,
# ncu.txt, bench.json and training_step.json. Calls with the same DIR add to these files.
# Without a GPU, or with --dry-run, every part runs up to its first launch: the GPU tests until they
# are skipped, the Triton kernels compiled for sm_90, every measurement on tiny tensors on the CPU.
#
# $PYTHON (python3) must have torch. pytest, hypothesis, pytest-benchmark, pytest-xdist, ninja and
# the packages of anchorops[train] may be installed, on PYTHONPATH, or wheels in the directory of
# --wheels; a part with a missing package is skipped and says so. anchorops/_cpu.so and
# anchorops/_cuda.so are compiled if they are not there. $ANCHOROPS_COMMIT names the commit if git is
# not available. Nothing is downloaded.
set -uo pipefail
exec </dev/null

root=$(realpath "$(dirname "$0")/..")
out=$root/build/gpu wheels= dry_run= calls=()
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$(realpath -m "${2:?--out needs a directory}") && shift ;;
    --wheels) wheels=$(realpath -m "${2:?--wheels needs a directory}") && shift ;;
    --dry-run) dry_run=yes ;;
    first | second | third) calls+=("$1") ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
    esac
    shift
done
[ ${#calls[@]} -gt 0 ] || calls=(first second third)
cd "$root" || exit

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton} # all parts compile a kernel once
mkdir -p "$out"
log=$out/log.txt summary=$out/summary.jsonl rows=$out/kernels.jsonl
if [ -z "$dry_run" ]; then
    "$python" -c 'import sys, torch; sys.exit(3 * (not torch.cuda.is_available()))' 2>>"$log"
    case $? in
    0) ;;
    3) dry_run=yes && echo "torch sees no GPU: a dry run" | tee -a "$log" ;;
    *) tail -n 3 "$log" && echo "gpu.sh: $python does not import torch: set PYTHON" && exit 2 ;;
    esac
fi
patience=1 failures=0 parts=0 minutes=1.5 rounds=2 steps=60
[ -z "$dry_run" ] || patience=5 minutes=0 rounds=1 steps=2 # a machine that has no GPU may be slow

record() { # name, exit status or "absent", time limit, seconds
    parts=$((parts + 1))
    printf '{"call": "%s", "part": "%s", "exit": "%s", "limit": %d, "seconds": %d}\n' \
        "$call" "$@" >>"$summary"
}

part() { # name, most seconds, command …
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS status=0 before
    local box=$((patience * limit))
    shift 2
    echo "== $call, $name: $*" | tee -a "$log"
    before=$(wc -l <"$log")
    if [ "$left" -lt 5 ]; then
        status=124 && echo "no time left" >>"$log"
    else
        # at SIGINT pytest prints its results so far; processes started with & would ignore SIGINT
        timeout --signal=INT --kill-after=10 $((box < left ? box : left)) \
            env --default-signal=INT "$@" >>"$log" 2>&1 || status=$?
    fi
    [ "$status" -eq 0 ] || failures=$((failures + 1))
    tail -n "+$((before + 1))" "$log" | tail -n 12 | cut -c -180
    record "$name" "$status" "$limit" $((SECONDS - start))
    echo "== $call, $name: exit $status after $((SECONDS - start)) s" | tee -a "$log"
}

absent() { # name, most seconds, reason
    record "$1" absent "$2" 0
    echo "== $call, $1: left out: $3" | tee -a "$log"
}

needing() { # packages, then a part as above: it is skipped if one of them is not installed
    local missing
    missing=$("$python" -c 'import importlib.util as u, sys
print(*(name for name in sys.argv[1].split() if u.find_spec(name) is None))' "$1")
    shift
    if [ -n "$missing" ]; then absent "$1" "$2" "not installed: $missing"; else part "$@"; fi
}

pytest=("$python" -m pytest -v -p no:cacheprovider --continue-on-collection-errors -m gpu)
measure=("$python" bench/gpu_kernels.py)
[ -z "$dry_run" ] || tiny=--tiny

gpu_tests() { # name, most seconds, selection: values and gradients first
    local files few=()
    mapfile -t files < <(
        printf '%s\n' tests/test_every_kernel.py tests/test_methods.py
        grep -lE '\.on\(.*"(gpu|cuda|triton)"' tests/test_*.py | grep -vE '_(every_kernel|methods|gpu)\.py'
        echo tests/test_gpu.py
    )
    if [ -n "$dry_run" ]; then
        few=(-rs)
    elif "$python" -c 'import xdist' 2>>"$log"; then
        few=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist load)
    fi
    needing "pytest hypothesis" "$1" "$2" "${pytest[@]}" "${few[@]}" "${files[@]}" -k "$3"
}

profile_with_ncu() {
    local ncu names
    ncu=$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>>"$log") || ncu=
    if [ -n "$dry_run" ]; then
        part ncu 100 "${measure[@]}" once --tiny
    elif [ -z "$ncu" ]; then
        absent ncu 100 "ncu is not here"
    else
        names=$(timeout 30 "${measure[@]}" largest --rows "$rows" 2>>"$log") || names="_kernel$"
        # without clock control, because the GPU may be somebody else's too
        part ncu 100 "$ncu" --set full --clock-control none --kernel-name "regex:$names" \
            --launch-count 20 --log-file "$out/ncu.txt" "${measure[@]}" once
    fi
}

sanitizers() { # every CUDA kernel, on small shapes
    local few=(tests/test_every_kernel.py -k "test_values_and_gradients and cuda")
    local sanitizer status tool options left=$((end - SECONDS))
    if [ -n "$dry_run" ]; then
        needing "pytest hypothesis" sanitizer 138 "${pytest[@]}" -rs "${few[@]}"
        return
    elif ! sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>>"$log"); then
        absent sanitizer 138 "compute-sanitizer is not here"
        return
    fi
    # on some virtual machines the sanitizer cannot use the GPU
    timeout --kill-after=5 $((left < 20 ? left > 1 ? left : 1 : 20)) "$sanitizer" \
        --report-api-errors no --error-exitcode 99 "$python" \
        -c 'import torch; torch.ones(9, device="cuda").sum().item()' >"$out/sanitizer" 2>&1
    status=$?
    if [ "$status" -ne 0 ]; then
        absent sanitizer 138 "exit $status: $(grep -m 1 '=====' "$out/sanitizer")"
    else
        for tool in memcheck racecheck synccheck; do
            # every tensor has its own allocation, so an access beyond its end is found;
            # torch makes calls that may fail, so only errors of kernels are reported
            options=(--tool "$tool" --error-exitcode 99 --print-limit 20)
            [ "$tool" != memcheck ] || options+=(--report-api-errors no)
            part "$tool" 46 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" \
                "${pytest[@]}" "${few[@]}"
        done
    fi
    rm -f "$out/sanitizer"
}

first() {
    part values 60 "${measure[@]}" values ${tiny:+"$tiny"} --rows "$rows"
    part bandwidth 40 "${measure[@]}" bandwidth ${tiny:+"$tiny"} --rows "$rows"
    gpu_tests cuda_tests 110 "not triton"
    part cuda_kernels 110 "${measure[@]}" kernels ${tiny:+"$tiny"} --rows "$rows" \
        --backend "${cuda:-auto}"
    profile_with_ncu
    sanitizers
}

second() {
    # first what the measurement needs, in parallel: one after the other takes minutes
    if [ -n "$dry_run" ]; then
        part compilation 110 "$python" bench/kernels_report.py --quick --targets sm_90
    else
        part compilation 110 "${measure[@]}" compile --backend triton
    fi
    part triton_kernels 120 "${measure[@]}" kernels ${tiny:+"$tiny"} --rows "$rows" \
        --backend "${triton:-auto}"
    gpu_tests triton_tests 280 triton
    part compiled_step 60 "${measure[@]}" compiled ${tiny:+"$tiny"} --rows "$rows"
}

third() {
    local benches where training
    benches=(bench/bench_class_moments.py bench/bench_pixel_losses.py
        bench/bench_losses.py bench/bench_centroid_info_nce.py)
    where=(--device cuda --seconds 0.05)
    [ -z "$dry_run" ] || where=(--device cpu --tiny)
    needing "pytest pytest_benchmark" bench 310 "$python" -m pytest -q -p no:cacheprovider \
        "${benches[@]}" --full "${where[@]}" --rows "$out/bench.json"
    training="tyro typeguard tifffile timm segmentation_models_pytorch sklearn PIL matplotlib torchmetrics torchvision tqdm"
    needing "$training pytest" training_step 180 "$python" bench/training_step.py \
        --rounds "$rounds" --minutes "$minutes" ${dry_run:+--dry-run} --out "$out/training_step.json"
    needing "$training" training_program 50 "$python" -m anchorops.train digits --methods sar \
        --steps "$steps" --workers 0 --out "$root/build/gpu-run" --name smoke
    rm -rf "$root/build/gpu-run"
}

[ -n "$dry_run" ] || cuda=cuda triton=triton
began=0 # the start of the script: the first import of torch can take half a minute
for call in "${calls[@]}"; do
    end=$((began + patience * 570))
    if [ -n "$wheels" ]; then
        part wheels 30 "$python" -m pip install --quiet --no-index --no-deps --upgrade \
            --target "$root/build/site" "$wheels"/*.whl
        export PYTHONPATH=$PYTHONPATH:$root/build/site
        wheels=
    fi
    if [ ! -f anchorops/_cpu.so ] || { [ -z "$dry_run" ] && [ ! -f anchorops/_cuda.so ]; }; then
        part build 300 "$python" setup.py build_ext --inplace
    fi
    "$call"
    began=$SECONDS
done

echo
echo "${dry_run:+dry run: }$failures of $parts parts failed, $SECONDS s, results in $out"
tail -n "$parts" "$summary"
exit "$failures"
