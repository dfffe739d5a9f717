#!/usr/bin/env bash
# Tests and benchmark of decoding on a GPU, most telling first, in at most four minutes: one JSON and its tables.
#
#     tests/gpu/run.sh                          # in the repository's own environment, or with python3
#     tests/gpu/run.sh --site gpu_site.tar.gz   # an image with PyTorch, no internet: see tools/pack_gpu_site.py
#     tests/gpu/run.sh --tiny                   # dry run on a CPU: whether tests and benchmark themselves work
#     tests/gpu/run.sh --training               # the benchmark of training in place of all that: training.json, .md
#
#   --output DIR      for gpu.json, gpu.md, tests.txt, benchmark.txt (default: $OUT, else gpu_results)
#   --seconds N       for everything (default: 235, what comes last is then left out; 3600 with --tiny)
#   --tests N         seconds of them for the tests (default: 45 %, none with --training); 0: the benchmark alone
#   --site FILE       packages for a machine that lacks them (default: gpu_site.tar.gz at the root, if it is there)
#   $PAM_PYTHON       the interpreter (default: .venv/bin/python, else python3)
#
# Exit status 1 if a test failed or there is no result.
set -euo pipefail

if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
output=${OUT:-gpu_results}
site=${root}/gpu_site.tar.gz
seconds='' tests='' tiny='' benchmark=gpu_decode name=gpu

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) tiny=--tiny && shift ;;
        --training) benchmark=gpu_training name=training tests=${tests:-0} && shift ;;
        --output | --seconds | --tests | --site)
            [ $# -ge 2 ] || fail "$1 needs a value"
            [ "$1" != --site ] || [ -f "$2" ] || fail "$2: no such file; make it: python tools/pack_gpu_site.py"
            [[ "$1" != --seconds && "$1" != --tests ]] || [[ "$2" =~ ^[0-9]+$ ]] || fail "$1 takes whole seconds, not '$2'"
            declare "${1#--}=$2"
            shift 2
            ;;
        *) fail "unknown option '$1'" "see $0 --help" ;;
    esac
done
seconds=${seconds:-$([ -n "${tiny}" ] && echo 3600 || echo 235)}
tests=${tests:-$((seconds * 45 / 100))}
mkdir -p "${output}"
output=$(cd "${output}" && pwd)
case "${site}" in /*) ;; *) site=${PWD}/${site} ;; esac
cd "${root}"

work=$(mktemp -d)
trap 'rm -rf "${work}"' EXIT
python=${PAM_PYTHON:-python3}
[ -n "${PAM_PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=${root}/.venv/bin/python
path=${root}
if [ -f "${site}" ] && [ "${python}" != "${root}/.venv/bin/python" ]; then
    "${python}" - "${site}" "${work}" <<'END'
import json, sys, tarfile

with tarfile.open(sys.argv[1]) as archive:
    archive.extractall(sys.argv[2], filter="data")  # nothing outside the folder, no links out of it, no devices
packed = json.load(open(f"{sys.argv[2]}/site/packed.json"))["python"]
own = "%d.%d" % sys.version_info[:2]
if packed != own:
    sys.exit(f"error: {sys.argv[1]} was packed for Python {packed}; this is {own}")
END
    path=${work}/site:${path}
fi
export PYTHONPATH=${path}${PYTHONPATH:+:${PYTHONPATH}} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export NUMBA_CACHE_DIR=${work}/numba

if ! missing=$("${python}" - <<'END'
import importlib.util as find

names = "torch triton numpy scipy tokenizers safetensors yaml tqdm transformers peft espnet2 pytest soundfile"
print(" ".join(name for name in names.split() if find.find_spec(name) is None))
END
); then
    fail "${python} does not run; set PAM_PYTHON"
fi
[ -z "${missing}" ] || fail "${python} lacks: ${missing}" \
    "tools/setup.sh makes an environment; without internet: python tools/pack_gpu_site.py elsewhere, then --site FILE"
if [ -n "${tiny}" ]; then
    export PAM_GPU_TESTS_ON_CPU=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
elif ! "${python}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    fail "PyTorch sees no CUDA GPU here; --tiny is the dry run on a CPU"
fi

failed=
if [ "${tests}" -gt 0 ]; then
    echo "== tests, ${tests} s"
    rm -f "${output}/tests.jsonl"
    left=$((tests > SECONDS ? tests - SECONDS : 1))
    PAM_GPU_REPORT=${output}/tests.jsonl PAM_GPU_SECONDS=${left} timeout --signal=INT --kill-after=5 $((left + 30)) \
        "${python}" -m pytest tests/gpu -q --tb=short --continue-on-collection-errors -p no:cacheprovider --durations=15 >"${output}/tests.txt" 2>&1 ||
        failed=" tests"
    tail -n 40 "${output}/tests.txt"
fi
left=$((seconds - SECONDS))
echo "== benchmark, ${left} s"
if [ "${left}" -lt 10 ] || ! "${python}" "tests/benchmarks/${benchmark}.py" ${tiny:+"${tiny}"} --limit "${left}" \
    --tests "${output}/tests.jsonl" --output "${output}/${name}.json" 2>&1 | tee "${output}/benchmark.txt"; then
    failed+=" benchmark"
fi
rm -f "${output}/tests.jsonl"  # in the JSON
echo "== ${SECONDS} s; results: ${output}/${name}.json, ${name}.md"
[ -z "${failed}" ] || fail "failed:${failed}; see ${output}"
