#!/usr/bin/env bash
# Checks everything: sets itself up, then shellcheck, ruff, mypy, pytest. All parts run, also after one has failed.
#
#     tests/run.sh                       # everything
#     tests/run.sh --fast                # without the tests marked slow
#     tests/run.sh tests/data -k pipes   # what follows goes to pytest
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks=()
if [ "${1:-}" = --fast ]; then
    marks=(-m "not slow")
    shift
fi

start=${SECONDS}
tools/setup.sh
export PATH="${PWD}/.venv/bin:${PATH}"
# One thread: two that wait for each other on a busy machine can be a hundred times slower. No GPU: CI has none.
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

times=("set-up $((SECONDS - start)) s")
failed=()

# part NAME COMMAND ...: runs it, notes its wall time and whether it failed.
part() {
    local name=$1 begun=${SECONDS} word=ok
    shift
    echo "== ${name}"
    "$@" || { word=failed && failed+=("${name}"); }
    times+=("${name} $((SECONDS - begun)) s (${word})")
}

# The scripts of this repository; a copy without git has the same ones beside what recipes made.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
else
    mapfile -t scripts < <(find egs tests tools utils .ci/run -name '*.sh' -not -path '*/downloads/*' -o -path .ci/run)
fi

summary() {
    local parts
    printf -v parts ', %s' "${times[@]}"
    echo "== wall time: ${parts:2}"
}

part shellcheck shellcheck -x "${scripts[@]}"
part ruff ruff check .
part mypy mypy
# pytest last, its closing line at the very end: the summary goes before it.
echo "== pytest"
begun=${SECONDS}
report=$(mktemp)
trap 'rm -f "${report}"' EXIT
python -m pytest "${marks[@]}" "$@" 2>&1 | tee "${report}" | sed '$d' || failed+=(pytest)
times+=("pytest $((SECONDS - begun)) s")
summary
[ ${#failed[@]} -eq 0 ] || echo "failed: ${failed[*]}"
tail -n 1 "${report}"
[ ${#failed[@]} -eq 0 ]
