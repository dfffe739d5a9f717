# shellcheck shell=bash
# Sourced by recipes: the root of the repository, its Python, and the environment set up on first use.
PAM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
export PAM_ROOT
if [ -n "${PAM_NO_SETUP:-}" ]; then
    # An environment of the user's own, made with `pip install -e .`
    python=${PAM_PYTHON:-python3}
else
    "${PAM_ROOT}/tools/setup.sh"
    python=${PAM_ROOT}/.venv/bin/python
fi
export python
export PATH="${PAM_ROOT}/utils:${PATH}"
# A bar redrawn ten times a second is for terminals; logs get a line now and then.
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-20}
# GNU's OpenMP threads wait for each other by spinning, but not for long: with other programs on the machine, two that
# spin as long as is usual keep each other from the core.
[ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
export PYTHONUNBUFFERED=1
export LC_ALL=C.UTF-8
