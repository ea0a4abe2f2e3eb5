#!/bin/bash
# The Hopper kernels under compute-sanitizer, on small shapes: memory, races in shared memory, barriers.
#
#     bash benchmarks/hopper_sanitizer.sh
#
# Its tools run side by side, each for LIMIT seconds at most. Exit 0: all are clean.
set -u
cd "$(dirname "$0")/.."
TOOLS=(memcheck racecheck synccheck)
folder=$(mktemp -d)

check() {
    # Without torch's pool of memory every tensor is an allocation, beyond whose end memcheck can see.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${LIMIT:-150}" compute-sanitizer --tool "$1" --target-processes all \
        --print-limit 5 --error-exitcode 9 "${PYTHON:-python3}" benchmarks/hopper_check.py --run tiny >"$folder/$1" 2>&1
    echo $? >"$folder/$1.code"
}

# Compiled once, before all want it.
timeout "${LIMIT:-150}" "${PYTHON:-python3}" benchmarks/hopper_check.py --run tiny | grep RESULT
for tool in "${TOOLS[@]}"; do
    check "$tool" &
done
wait
failed=0
for tool in "${TOOLS[@]}"; do
    echo "== $tool: exit $(cat "$folder/$tool.code")"
    grep -E "SUMMARY|RESULT|Error|Invalid|hazard|in block" "$folder/$tool" | sort | uniq -c | sort -rn | head -8 | cut -c1-250
    [ "$(cat "$folder/$tool.code")" = 0 ] || failed=1
done
exit $failed
