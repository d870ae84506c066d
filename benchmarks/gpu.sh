#!/usr/bin/env bash
# benchmarks/gpu.sh PART [--dry-run]: what a GPU has to show, in parts that end by themselves; `all` prints the plan.
#
# Needs no network: builds the extensions for the GPU that is there and installs the wheels in wheels/, of peers, say. Leaves
# PART.log, of benchmarks also PART.csv and its tables in PART.md, in $OUT (else benchmarks/results/cuda); when it is stopped,
# what finished is there. Exit status 1 if a step failed. --dry-run: the same on the CPU, tiny, kernels interpreted;
# `all --dry-run` does it with every part.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=(tests ops heads gae attention generation loops)
declare -A seconds=([tests]=280 [ops]=320 [heads]=150 [gae]=50 [attention]=50 [generation]=130 [loops]=400)
part=${1:-all} dry=${2:-}
if [[ $part == all ]]; then
    for part in "${parts[@]}"; do
        [[ -z $dry ]] || benchmarks/gpu.sh "$part" --dry-run
        echo "benchmarks/gpu.sh $part    # at most ${seconds[$part]} seconds"
    done
    echo "and two minutes to build, the first time"
    exit
elif [[ -z ${seconds[$part]:-} || ($dry && $dry != --dry-run) ]]; then
    echo "usage: benchmarks/gpu.sh PART [--dry-run]; PART is all, ${parts[*]}" >&2
    exit 2
fi

python=${PYTHON:-python3} device=cuda status=0 running=
[[ -z $dry ]] || device=cpu
out=$(realpath -m "${OUT:-${dry:+build/gpu-dry-run}}")
[[ -n ${OUT:-$dry} ]] || out=$PWD/benchmarks/results/cuda
csv=$out/$part.csv
mkdir -p "$out" build
rm -f "$out/$part".{log,csv,md}
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/build/wheels${PYTHONPATH:+:$PYTHONPATH}"
exec > >(tee >(head -c 2000000 >"$out/$part.log"; cat >/dev/null)) 2>&1
tee=$!

finish() {
    [[ -z $running ]] || kill "$running" || true
    [[ ! -f $csv ]] || "$python" -m benchmarks.tables "$csv" >"$out/$part.md"
    echo "gpu.sh: $part ended after $SECONDS seconds with status $status"
    exec >&- 2>&-
    wait "$tee"
    exit "$status"
}
trap 'status=143; exit' TERM INT
trap finish EXIT

step() { # step SECONDS COMMAND ...: goes on after a failure, and ends when the part has to
    local left=$((end - SECONDS)) most=$1 code=0
    [[ -z $dry ]] || left=600 most=600 # however slow the machine is
    shift
    echo $'\n'"== $*"
    timeout --kill-after=5 "$((left < 1 ? 1 : left < most ? left : most))" "$@" &
    running=$!
    wait "$running" || code=$?
    running=
    [[ $code == 0 ]] || { status=1 && echo "gpu.sh: status $code (124: out of time) of $*"; }
}

bench() { # bench SECONDS NAME [OPTION ...]
    step "$1" "$python" -m benchmarks "${@:2}" --device "$device" --into "$csv" ${dry:+--tiny --seconds 0}
}

end=$((SECONDS + 120))
if [[ -z $dry ]]; then
    if compgen -G "wheels/*.whl" >/dev/null; then
        step 60 "$python" -m pip install -q --no-index --no-deps --upgrade --target build/wheels wheels/*.whl
    fi
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    FASTRLHF_CUDA=1 FASTRLHF_CUDA_ARCHS=$arch step 120 "$python" setup.py -q build_ext --inplace
fi
end=$((SECONDS + seconds[$part]))
for module in liger_kernel cut_cross_entropy trl xdist; do
    "$python" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$module'))" || echo "gpu.sh: no $module here"
done

case $part in
tests)
    # a warning of a version that we do not know is no reason to fail, and benchmark's plugin warns of xdist's
    pytest=("$python" -m pytest -q --tb=short -W default -p no:cacheprovider -p no:benchmark)
    native=(--device cuda)
    [[ -z $dry ]] || native=(--device interpreter -k "approx_kl and accurate")
    workers=()
    [[ $dry ]] || ! "$python" -c "import xdist" 2>/dev/null || workers=(-n 8) # most of the time Triton compiles
    step 30 "$python" -m fastrlhf info
    step 150 "${pytest[@]}" "${native[@]}" "${workers[@]}" tests/ops/test_contract.py tests/models/test_attention.py
    step 90 "$python" -m fastrlhf check --device "$device" ${dry:+--matrix}
    step 120 "${pytest[@]}" "${native[@]::2}" tests/gpu -m "not slow"
    step 100 "${pytest[@]}" "${native[@]::2}" tests/gpu -m slow
    ;;
ops)
    ops=(benchmarks/ops/bench_*.py)
    ops=("${ops[@]#*bench_}")
    [[ -z $dry ]] || ops=(approx_kl.py kl_divergence.py group_advantages.py) # the others: tests/project/test_benchmarks.py
    bench 320 "${ops[@]%.py}" --seconds 0.3
    ;;
heads)
    sizes=(2048x2048x32000 8192x4096x32000 8192x4096x128256 32768x4096x128256 8192x8192x256000 2048x4096x256000)
    [[ -z $dry ]] || sizes=(6x4x50)
    bench 80 linear_cross_entropy --sizes "${sizes[@]}" --seconds 0.3
    bench 150 linear_token_logprobs --sizes "${sizes[@]}" --seconds 0.3
    ;;
gae) bench 50 gae --seconds 1 ;;
attention) bench 50 packing --seconds 1 ;;
generation) bench 130 generation --seconds 1 ;;
loops) # the largest last, as they may not fit in memory or time
    shapes=(135m 1.5b 3b)
    [[ -z $dry ]] || shapes=(tiny)
    for shape in "${shapes[@]}"; do
        for loop in sft reward ppo dpo groups; do bench 100 "$loop" --shape "$shape" --repeats 1; done
    done
    ;;
esac
