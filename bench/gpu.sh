#!/usr/bin/env bash
# Runs all tests and measurements that need a GPU, in under ten minutes:
#
#     bench/gpu.sh [--out DIR] [--dry-run]
#
# Tests come first, then speed. Each part has a time limit and a log. If a part fails, this is
# recorded and the others still run; the exit status is the number of failed parts. DIR (build/gpu)
# receives bench.json with its plots, training_step.json, summary.json and logs.tar.gz.
# Without a GPU, or with --dry-run, every part runs up to its first launch: the build, the
# collection of the GPU tests, every benchmark on tiny tensors on the CPU.
#
# $PYTHON (python3) must have torch. pytest, pytest-benchmark, ninja, matplotlib and the packages of
# anchorops[train] may be on PYTHONPATH; a part with a missing package is skipped and says so.
# $ANCHOROPS_COMMIT names the commit if git is not available. Nothing is installed or downloaded.
set -uo pipefail
exec </dev/null

root=$(realpath "$(dirname "$0")/..")
out=$root/build/gpu dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$(realpath -m "${2:?--out needs a directory}") && shift ;;
    --dry-run) dry_run=yes ;;
    *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit 2 ;;
    esac
    shift
done
cd "$root" || exit

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || dry_run=yes
mkdir -p "$out"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
budget=570 patience=1 failures=0 parts=() steps=60
[ -z "$dry_run" ] || budget=3000 patience=5 steps=2 # a machine that has no GPU may be slow

part() { # name, most seconds, command …
    local name=$1 box=$((patience * $2)) left=$((budget - SECONDS)) start=$SECONDS status=0
    shift 2
    if [ "$left" -lt 5 ]; then
        status=124 && echo "no time left" >"$logs/$name.log"
    else
        echo "== $name: $*"
        # at SIGINT pytest prints its results so far; processes started with & would ignore SIGINT
        timeout --signal=INT --kill-after=10 $((box < left ? box : left)) \
            env --default-signal=INT "$@" \
            >"$logs/$name.log" 2>&1 || status=$?
        tail -n 12 "$logs/$name.log" | cut -c -180
    fi
    [ "$status" -eq 0 ] || failures=$((failures + 1))
    parts+=("$name $status $((SECONDS - start))")
    echo "== $name: exit $status after $((SECONDS - start)) s"
}

absent() { # name, reason
    parts+=("$1 absent 0") && echo "== $1: left out: $2"
}

needing() { # packages, then a part as above: it is skipped if one of them is not installed
    local missing
    missing=$("$python" -c 'import importlib.util as u, sys
print(*(name for name in sys.argv[1].split() if u.find_spec(name) is None))' "$1")
    shift
    if [ -n "$missing" ]; then absent "$1" "not installed: $missing"; else part "$@"; fi
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
benches=(bench/bench_class_moments.py bench/bench_pixel_losses.py bench/bench_growth.py
    bench/bench_losses.py bench/bench_centroid_info_nce.py)
rows=$out/bench.json
rm -f "$rows" "$out/training_step.json"

part build 180 "$python" setup.py build_ext --inplace
if [ -n "$dry_run" ]; then
    part tests 60 "${pytest[@]}" tests/test_gpu*.py --collect-only
    part collect 60 "${pytest[@]}" "${benches[@]}" --full --device cuda --collect-only
    part doctor 60 "$python" -m anchorops.doctor --benchmark
    part bench 120 "${pytest[@]}" "${benches[@]}" --full --tiny --device cpu --rows "$rows"
else
    # values, gradients, streams, reproducibility, capture in a CUDA graph, torch.compile
    part tests 120 "${pytest[@]}" tests/test_gpu*.py
    if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer); then
        few=(tests/test_gpu.py tests/test_gpu_softmax_moments.py -k "reproducible or (test_centroid_info_nce and shape0)")
        # on some virtual machines the sanitizer cannot use the GPU
        timeout --kill-after=5 40 "$sanitizer" --report-api-errors no --error-exitcode 99 "$python" \
            -c 'import torch; torch.ones(9, device="cuda").sum().item()' >"$logs/sanitizer.log" 2>&1
        status=$? tools=(memcheck racecheck)
        if [ "$status" -ne 0 ]; then
            tools=()
            absent sanitizer "exit $status: $(grep -m 1 '=====' "$logs/sanitizer.log")"
        fi
        for tool in "${tools[@]}"; do
            # every tensor has its own allocation, so an access beyond its end is found;
            # torch makes calls that may fail, so only errors of kernels are reported
            options=(--tool "$tool" --error-exitcode 99 --print-limit 20)
            [ "$tool" != memcheck ] || options+=(--report-api-errors no)
            part "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" \
                "${pytest[@]}" "${few[@]}"
        done
    else
        absent sanitizer "compute-sanitizer is not here"
    fi
    part doctor 45 "$python" -m anchorops.doctor --benchmark
    part bench 210 "${pytest[@]}" "${benches[@]}" --full --device cuda --seconds 0.05 --rows "$rows"
fi
needing matplotlib plots 30 "$python" bench/plot.py "$rows"
training="tyro timm segmentation_models_pytorch sklearn PIL matplotlib torchmetrics torchvision tqdm"
if [ -f bench/training_step.py ]; then
    needing "$training pytest" training_step 120 "$python" bench/training_step.py --minutes 1.3 \
        ${dry_run:+--dry-run} --out "$out/training_step.json"
else
    absent training_step "bench/training_step.py is not here"
fi
needing "$training" smoke 60 "$python" -m anchorops.train digits --methods sar --steps "$steps" \
    --workers 0 --out "$logs/run" --name smoke

printf '%s\n' "${parts[@]}" | "$python" -c '
import json, sys
parts = [line.split() for line in sys.stdin]
print(json.dumps([{"part": p, "exit": s, "seconds": int(t)} for p, s, t in parts], indent=1))
' >"$out/summary.json"
rm -rf "$logs/run"
tar -czf "$out/logs.tar.gz" -C "$logs" .
echo
echo "${dry_run:+dry run: }$failures of ${#parts[@]} parts failed, $SECONDS s, results in $out"
printf '%s\n' "${parts[@]}" | while read -r name status seconds; do
    printf '%-16s exit %-8s %s s\n' "$name" "$status" "$seconds"
done
exit "$failures"
