#!/usr/bin/env bash
# Checks everything: sets itself up, then pytest in two processes and, beside it, shellcheck, ruff and mypy.
#
#     tests/run.sh                       # everything but the tests marked services (minutes each), see .ci/run
#     tests/run.sh --fast                # without the tests marked slow, too
#     tests/run.sh tests/data -k pipes   # what follows goes to pytest
#     tests/run.sh -m services           # the others, with what they need: see .ci/run
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks="not services"
if [ "${1:-}" = --fast ]; then
    marks="not services and not slow"
    shift
fi

start=${SECONDS}
tools/setup.sh
times="set-up $((SECONDS - start)) s"
export PATH="${PWD}/.venv/bin:${PATH}"
# One thread: two that wait for each other on a busy machine can be a hundred times slower. No GPU: CI has none.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE CUDA_VISIBLE_DEVICES=

work=$(mktemp -d)
trap 'rm -rf "${work}"' EXIT

# The scripts of this repository; a copy without git has the same ones beside what recipes made.
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
else
    mapfile -t scripts < <(find egs tests tools utils .ci/run -name '*.sh' -not -path '*/downloads/*' -o -path .ci/run)
fi

part() {
    # part NAME COMMAND...: run it; note in $work its wall time and, if it failed, its name.
    local name=$1 begun=${SECONDS}
    shift
    echo "== ${name}"
    "$@" || echo " ${name}" >>"${work}/failed"
    echo ", ${name} $((SECONDS - begun)) s" >>"${work}/times"
}

static() {
    part shellcheck shellcheck -x "${scripts[@]}"
    part ruff ruff check .
    part mypy mypy
}

# Few cores are enough for both: tests often wait for processes that they have started.
static >"${work}/static" 2>&1 &
begun=${SECONDS}
echo "== pytest"
# A file stays in one process, which makes its fixtures once; files begin in the order of tests/conftest.py.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 -m "${marks}" "$@" 2>&1 |
    tee "${work}/pytest" | sed -u '$d' || echo " pytest" >>"${work}/failed"
times+=", pytest $((SECONDS - begun)) s"
wait
cat "${work}/static"
# pytest's closing line comes last.
case "$*" in
    *"-m "*) ;;
    *) echo "== left out: tests marked services (minutes, or a real Slurm, METEOR, the page in Chromium); .ci/run runs them" ;;
esac
echo "== wall time: ${times}; beside pytest: $(tr -d '\n' <"${work}/times" | cut -c3-)"
[ ! -f "${work}/failed" ] || echo "failed:$(tr -d '\n' <"${work}/failed")"
tail -n 1 "${work}/pytest"
[ ! -f "${work}/failed" ]
