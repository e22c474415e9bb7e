#!/usr/bin/env bash
# Everything worth measuring on the day a GPU is there, the most telling first:
#
#     bash bench/gpu_day.sh              # on the GPU; results in bench/results
#     DRY_RUN=1 bash bench/gpu_day.sh    # every step on the CPU at tiny sizes; or --dry-run
#
# Each result is written as soon as it is there, and the card after each step. A step that fails, or
# takes longer than its limit, does not stop the rest. The same command, cut off or not, goes on with
# what has not passed for this commit; FRESH=1 begins anew. RESULTS names another folder, PYTHON
# another interpreter, STEPS some of the steps, LIMIT_step=300 the limit of one of them.
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
if ! "$python" -c 'import torch, triton' 2>/dev/null; then
    echo "gpu_day: error: torch and triton are missing: pip install torch" >&2
    exit 2
fi
# The number of GPUs, and what the names of results end in.
read -r gpus suffix < <("$python" -c "import torch
from bench._report import results_name
print(torch.cuda.device_count(), results_name(''))" 2>/dev/null)
if [[ -z $dry && ${gpus:-0} == 0 ]]; then
    echo "gpu_day: error: torch finds no GPU here; --dry-run tries every step without one" >&2
    exit 2
fi
if ! "$python" -c 'from importlib.util import find_spec as find
assert all(map(find, "hypothesis matplotlib pytest_benchmark pytest_timeout xdist".split()))' \
    2>/dev/null; then
    if ! "$python" -m pip install -q -e '.[test]'; then
        echo "gpu_day: error: packages are missing: pip install -e '.[test]'" >&2
        exit 2
    fi
fi

results=${RESULTS:-bench/results}
[[ -n $dry ]] && results=${RESULTS:-$(mktemp -d)}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
log="$results/gpu_day_$(date +%Y%m%d_%H%M%S).log"
exec > >(tee -a "$log") 2>&1
commit=$(git rev-parse --short HEAD 2>/dev/null || echo none)
ended="$results/gpu_day.steps" # NAME, how it ended, commit; separated by tabs
[[ -n ${FRESH:-} ]] && rm -f "$ended"
touch "$ended"
summary=()
failed=0
running=
extra=0 # seconds for compiling, as the doctor measured it

step() { # NAME SECONDS COMMAND...: run it within the limit, and note how it ended
    local name=$1 limit=$(($2 + extra)) start=$SECONDS code=0 own="LIMIT_$1"
    limit=${!own:-$limit}
    shift 2
    if [[ -n ${STEPS:-} && " $STEPS " != *" $name "* ]]; then return; fi
    if grep -q "^$name	passed	$commit\$" "$ended"; then
        summary+=("$(printf '%-12s %4d s  %s' "$name" 0 "passed before")")
        return
    fi
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
    printf '%s\t%s\t%s\n' "$name" "$verdict" "$commit" >>"$ended"
    "$python" -m bench.card write "$results" >/dev/null
}
interrupted() {
    [[ -n $running ]] && kill "$running"
    echo "gpu_day: interrupted, what is whole lies in $results; the same command goes on" >&2
    exit 130
}
trap interrupted INT TERM

doctor() {
    "$python" -m fastalex.doctor --json >"$results/doctor.part"
    local code=$?
    [[ $code -le 1 ]] && mv "$results/doctor.part" "$results/doctor.json"
    return $code
}
train() { # GPUS BATCH PRECISION OPTIONS...
    local folder="$results/train_$1_$2_$3"
    rm -rf "$folder"
    local options=(--batch-size "$2" --precision "$3" --output "$folder" --log-every 10)
    shift 3
    "$python" -m fastalex.train "${options[@]}" "$@"
}
trains() { # GPUS: as trained, each batch and precision
    local batch precision code=0
    for batch in 128 1024; do
        for precision in bf16 tf32; do
            train "$1" "$batch" "$precision" --gpus "$1" --image-size 224 --max-steps 60 || code=1
        done
    done
    return $code
}
export -f doctor train trains
export python results

bench=("$python" -m pytest --benchmark-only --save-results "$results" -q)
tests=("$python" -m pytest -q -m gpu -o addopts=-ra)
tiles="$results/tiles$suffix"
step environment 60 "$python" -m bench.card environment "$results"
if [[ -n $dry ]]; then
    step doctor 240 bash -c doctor
    step step 180 "${bench[@]}" --batch-size 1 --rounds 1 -k "stock and not shared" bench/bench_step.py
    step train 120 bash -c 'train 1 128 float32 --image-size 64 --max-steps 2 --workers 1'
    step layers 120 "${bench[@]}" --batch-size 1 --rounds 1 -k "conv5 or pool5" bench/bench_layers.py
    step tune 120 "$python" -m fastalex.tune --dry-run --gpu h100 --layer fc8 --batch-size 16 \
        --candidates 2 --output "$tiles"
    step tests 120 "${tests[@]}" tests/kernels/test_gpu.py
else
    step doctor 300 bash -c doctor
    extra=$("$python" -c "import json, sys
rows = json.load(open(sys.argv[1]))['rows']
print(round(sum(row['values'].get('seconds', 0) for row in rows)))" "$results/doctor.json" \
        2>/dev/null || echo 60)
    step step 210 "${bench[@]}" --compiled bench/bench_step.py
    step train 120 bash -c 'trains 1'
    [[ $gpus -ge 2 ]] && step towers 120 bash -c 'trains 2'
    step graph 60 "${tests[@]}" tests/training
    step layers 60 "${bench[@]}" -k "not templates" bench/bench_layers.py
    step tune 75 "$python" -m fastalex.tune --candidates 4
    # The kernels read the table from the user's cache; a copy belongs to the results.
    "$python" -c "import shutil, sys, torch
from fastalex_kernels.common.tuned import table_path
shutil.copyfile(table_path(torch.cuda.get_device_name()), sys.argv[1])" "$tiles" 2>/dev/null
    # The session limit ends a run between two tests, so that what was found is reported.
    step tests 110 "${tests[@]}" -n 8 --session-timeout 100 tests
fi

"$python" -m bench.card write "$results"
printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
printf 'results in %s, log %s\n' "$results" "$log"
exit $failed
