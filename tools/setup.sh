#!/usr/bin/env bash
# Makes the environment: a Python >= 3.12, .venv with the packages of requirements.lock, this repository, a check.
set -euo pipefail

usage="Usage: tools/setup.sh [--extras NAME,...] [--venv DIR] [--force]

Without options: makes .venv at the root of the repository, or returns at once when it is up to date.
  --extras NAME,...  install further extras of setup.cfg, as requirements-extras.lock has them: demo, import, serve,
                     quantize, docs
  --venv DIR         another folder for the environment
  --force            make it anew, also when it is up to date

Interpreter, first that fits: \$PAM_PYTHON, PATH, pyenv, conda, 'uv python install 3.12'. uv comes from PATH, else it is
installed into tools/.uv. No package is installed outside of these two directories."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${root}/.venv
extras=
force=false
python_wanted=3.12  # what uv fetches when the machine has nothing that fits

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case "$1" in
        --extras | --venv)
            [ $# -ge 2 ] || fail "$1 needs a value"
            if [ "$1" = --extras ]; then extras=$2; else venv=$2; fi
            shift 2
            ;;
        --force) force=true && shift ;;
        -h | --help) echo "${usage}" && exit 0 ;;
        *) fail "unknown option '$1'" "$(head -n 1 <<<"${usage}")" ;;
    esac
done
[[ ${extras} =~ ^[a-z,]*$ ]] || fail "--extras takes names from setup.cfg separated by commas, not '${extras}'"
case "${venv}" in /*) ;; *) venv=${PWD}/${venv} ;; esac

# shellcheck source=tools/find_python.sh
. "${root}/tools/find_python.sh"

lock=${root}/tools/requirements.lock
private=${root}/tools/.uv      # uv where the machine has none, and the lock between two processes; ignored by git
stamp=${venv}/.pam-installed   # written last: what was installed
begun=${venv}/.pam-unfinished  # there while packages are being installed

sha256() { if type -P sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

state() {  # what the environment depends on, as text
    echo "${root}"
    (cd "${root}" && sha256 tools/requirements.lock setup.cfg pyproject.toml)
}

up_to_date() {
    [ "${force}${extras}" = false ] && [ -x "${venv}/bin/python" ] && [ -f "${stamp}" ] && [ "$(<"${stamp}")" = "$(state)" ]
}

find_uv() {  # prints the path of uv; installs it if need be
    local base name
    if type -P uv; then
        return
    fi
    if "${private}/venv/bin/uv" --version >/dev/null 2>&1; then
        echo "${private}/venv/bin/uv"
        return
    fi
    base=$(find_python) || base=
    for name in "${base}" python3 python; do
        type -P "${name}" >/dev/null || continue
        rm -rf "${private}/venv"
        echo "installing uv into tools/.uv with ${name}" >&2
        if "${name}" -m venv "${private}/venv" >&2 && "${private}/venv/bin/python" -m pip install -q 'uv>=0.8,<1' >&2; then
            echo "${private}/venv/bin/uv"
            return
        fi
    done
    fail "uv is not on PATH and could not be installed into tools/.uv" \
        "install it (python3 -m pip install --user uv), or the venv module (Debian: apt install python3-venv), then run this again"
}

if up_to_date; then
    exit 0
fi

# One at a time; who waited finds the work done. (macOS has no flock: there, do not start two at once.)
mkdir -p "${private}"
echo '*' >"${private}/.gitignore"
if type -P flock >/dev/null; then
    exec 9>"${private}/lock"
    if ! flock -n 9; then
        echo "another tools/setup.sh is at work: waiting for it"
        flock 9
        force=false
    fi
    if up_to_date; then
        exit 0
    fi
fi

SECONDS=0
uv=$(find_uv)
if ! python=$(find_python); then
    [ -z "${PAM_PYTHON:-}" ] || exit 1
    echo "no Python >= 3.12, < 3.14 on PATH, in pyenv or in conda: asking uv for one"
    if ! "${uv}" python install "${python_wanted}" || ! python=$("${uv}" python find --managed-python "${python_wanted}"); then
        fail "there is no Python >= 3.12, < 3.14 here, and uv could not fetch one" \
            "install one (Debian: apt install python3.12, pyenv install 3.12, conda create -n py312 python=3.12)," \
            "or name it: PAM_PYTHON=/path/to/python3.12 tools/setup.sh"
    fi
fi
python=$(python_at "${python}")

# A new environment if there is none, if it is half-made, or if its Python is gone or does not fit.
if [ "${force}" = true ] || [ -e "${begun}" ] || ! python_at "${venv}/bin/python" >/dev/null; then
    if [ -n "$(ls -A "${venv}" 2>/dev/null)" ] && [ ! -f "${venv}/pyvenv.cfg" ] && [ ! -e "${begun}" ]; then
        fail "${venv} is there and is not a virtual environment" "remove it, or choose another folder with --venv DIR"
    fi
    echo "making ${venv} with ${python}"
    "${uv}" venv --quiet --clear --no-project --prompt pam-espnet --python "${python}" "${venv}"
fi
rm -f "${stamp}"
state >"${begun}"  # as it is now: a file edited while packages are installed must not count as installed
echo "installing the packages of tools/requirements.lock"
"${uv}" pip install --python "${venv}/bin/python" --require-hashes -r "${lock}"
# The lock holds setuptools, so that this needs no index.
"${uv}" pip install --quiet --python "${venv}/bin/python" --no-build-isolation --no-deps -e "${root}"
if [ -n "${extras}" ]; then
    "${uv}" pip install --python "${venv}/bin/python" --no-build-isolation -c "${lock}" \
        -c "${lock%.lock}-extras.lock" -e "${root}[${extras}]"
fi
"${venv}/bin/python" "${root}/tools/check_install.py"
mv "${begun}" "${stamp}"
echo "tools/setup.sh: ${venv} is ready (${SECONDS} s)"
