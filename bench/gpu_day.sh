#!/usr/bin/env bash
# Everything worth measuring on the day a GPU is there, in less than nine minutes:
#
#     bash bench/gpu_day.sh              # on the GPU; results in bench/results
#     DRY_RUN=1 bash bench/gpu_day.sh    # every step on the CPU at tiny sizes; or --dry-run
#
# Every step has a time limit, and one that fails does not stop the rest. RESULTS names another
# folder for what is written, PYTHON another interpreter, STEPS some of the steps.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for argument in "$@"; do
    case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    *)
        echo "gpu_day: error: $argument: the only option is --dry-run" >&2
        exit 2
        ;;
    esac
done
dry=${DRY_RUN:+1}
python=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# The device, and what the names of its results end in.
read -r device suffix < <("$python" -c "from bench._report import device, results_name
print(device(), results_name(''))")
if [[ -z $dry && ${device:-cpu} == cpu ]]; then
    echo "gpu_day: error: torch finds no GPU here; --dry-run tries every step without one" >&2
    exit 2
fi
if ! "$python" -c 'import hypothesis, matplotlib' 2>/dev/null; then
    echo "gpu_day: error: packages are missing: pip install -e '.[test]' pytest-xdist" >&2
    exit 2
fi

results=${RESULTS:-bench/results}
[[ -n $dry ]] && results=${RESULTS:-$(mktemp -d)}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
log="$results/gpu_day_$(date +%Y%m%d_%H%M%S).log"
exec > >(tee -a "$log") 2>&1
summary=()
failed=0
running=

step() { # NAME SECONDS COMMAND...: run it within the limit, and note how it ended
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    if [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]]; then return; fi
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    # In the background, so that Ctrl-C is heard while it runs; timeout ends all it has started.
    timeout --kill-after=5 "$limit" "$@" &
    running=$!
    wait "$running" || code=$?
    running=
    local verdict=passed
    if [[ $code -eq 124 || $code -eq 137 ]]; then verdict="stopped after $limit s"; fi
    if [[ $code -ne 0 && $verdict == passed ]]; then verdict="failed with code $code"; fi
    [[ $code -eq 0 ]] || failed=1
    summary+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}
interrupted() {
    [[ -n $running ]] && kill "$running"
    echo "gpu_day: interrupted, what is whole lies in $results" >&2
    exit 130
}
trap interrupted INT TERM

environment() {
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    "$python" -c "import json, torch
from fastalex.common.provenance import provenance
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
print(json.dumps(provenance(device), indent=1))"
}
profile() { # OPTIONS...
    local folder="$results/profile"
    "$python" -m fastalex.profiler --output "$folder" "$@" &&
        cp "$folder/profile.json" "$results/profile$suffix"
}
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
export -f environment profile
export python results suffix

# Every comparison is saved as soon as it is made: a step that runs out of time leaves the others.
bench=("$python" -m pytest --benchmark-only --save-results "$results" -q)
tests=("$python" -m pytest -q -m gpu -o addopts=-ra)
tiles="$results/tiles$suffix"
if [[ -n $dry ]]; then
    step environment 60 bash -c environment
    step step 180 "${bench[@]}" --batch-size 1 --rounds 1 -k stock bench/bench_step.py
    step layers 120 "${bench[@]}" --batch-size 1 --rounds 1 -k "conv5 or pool5" bench/bench_layers.py
    step tests 120 "${tests[@]}" tests/kernels/test_gpu.py
    step tune 120 "$python" -m fastalex.tune --dry-run --gpu h100 --layer fc8 --batch-size 16 \
        --candidates 2 --output "$tiles"
    step profile 120 bash -c 'profile "$@"' profile --batch-size 1 --rounds 1 --image-size 67 \
        --no-compile --layer conv5 fc8 net
else
    step environment 20 bash -c environment
    step step 210 "${bench[@]}" --compiled bench/bench_step.py
    step layers 60 "${bench[@]}" bench/bench_layers.py
    # The session limit ends a run between two tests, so that what was found is reported.
    step tests 110 "${tests[@]}" "${workers[@]}" --session-timeout 100 tests
    step tune 75 "$python" -m fastalex.tune --candidates 6 --seconds 50
    step profile 60 bash -c 'profile "$@"' profile --no-compile
    # The kernels read the table from the user's cache; a copy belongs to the results.
    "$python" -c "import shutil, sys, torch
from fastalex_kernels.common.tuned import table_path
shutil.copyfile(table_path(torch.cuda.get_device_name()), sys.argv[1])" "$tiles" 2>/dev/null
fi

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
printf 'results in %s, log %s\n' "$results" "$log"
exit $failed
