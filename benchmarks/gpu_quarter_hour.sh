#!/bin/bash
# What one GPU of 80 GB can answer in a quarter of an hour: the tests marked `gpu`, what a cycle costs at the size of
# SD3-Medium, and the dress rehearsal of its LoRA recipe at 1024x1024. Nothing is downloaded, weights are random.
#
#     bash benchmarks/gpu_quarter_hour.sh [OUT]        # default: gpu_quarter_hour
#
# In an environment with the package and its `test` extra, from anywhere. Leaves in OUT: gpu_tests.xml, step.json,
# sweep.json, rehearsal.json, summary.json (seconds and exit status of each part) and a log of each part. A part that
# fails or takes too long does not keep the others from running.
#
# It has not run: no GPU was at hand (docs/gpus.md).
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-gpu_quarter_hour}"
out=$(cd "${1:-gpu_quarter_hour}" && pwd)
cd "$root" || exit 1
python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "torch finds no GPU")' || exit 2

rows=()
part() {  # name, limit in seconds, command ...
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    rows+=("\"$name\": {\"seconds\": $((SECONDS - start)), \"status\": $status}")
    echo "$name: $((SECONDS - start)) s, exit status $status"
}

part gpu_tests 240 python -m pytest -q -m gpu --junitxml "$out/gpu_tests.xml"
part step 210 python benchmarks/step.py --config sd3-medium --cycles 2 --json "$out/step.json"
part sweep 210 python benchmarks/step.py --config sd3-medium --sweep --settings checkpointing fused --cycles 1 \
    --json "$out/sweep.json"
part rehearsal 240 python benchmarks/rehearsal.py sd3-medium --size 1024 --max-steps 25 --json "$out/rehearsal.json"

(IFS=,; echo "{${rows[*]}}") | python -m json.tool >"$out/summary.json"
cat "$out/summary.json"
