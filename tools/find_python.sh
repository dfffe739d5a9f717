#!/usr/bin/env bash
# Finds a Python that ESPnet 202611 accepts (>= 3.12, < 3.14). Sourced by setup.sh; run by itself, it prints the path.

# python_at CANDIDATE: if it is such a Python, print the path of the interpreter behind it (behind a pyenv shim, behind
# an activated virtual environment, which may be the very one that is about to be made anew).
python_at() {
    "$1" -c 'import sys; assert (3, 12) <= sys.version_info < (3, 14); print(sys._base_executable)' 2>/dev/null </dev/null
}

# newest_first DIR...: the interpreters DIR/bin/python that exist, the highest version name first.
newest_first() {
    printf '%s\n' "$@" | LC_ALL=C sort -rV | while read -r dir; do
        [ ! -x "${dir}/bin/python" ] || printf '%s\n' "${dir}/bin/python"
    done
}

# candidates: one interpreter per line, the most deliberate choice first.
candidates() {
    local name root roots
    for name in python3.12 python3.13 python3; do  # 3.12 first: what the locked packages are tested with
        type -aP "${name}" || true
    done
    roots=("${PYENV_ROOT:-${HOME}/.pyenv}")
    if [ -z "${PYENV_ROOT:-}" ] && type -P pyenv >/dev/null; then
        roots+=("$(pyenv root 2>/dev/null || true)")
    fi
    for root in "${roots[@]}"; do
        newest_first "${root}"/versions/3.12*
        newest_first "${root}"/versions/3.13*
    done
    roots=("${CONDA_PREFIX:-}" "${HOME}/miniforge3" "${HOME}/mambaforge" "${HOME}/miniconda3" "${HOME}/anaconda3")
    if [ -n "${CONDA_EXE:-}" ]; then
        roots+=("$(dirname "$(dirname "${CONDA_EXE}")")")
    fi
    for root in "${roots[@]}"; do
        [ -z "${root}" ] || newest_first "${root}" "${root}"/envs/*
    done
}

# find_python: print the interpreter's path, or return 1. $PAM_PYTHON, when set, is the only candidate.
find_python() {
    local candidate
    if [ -n "${PAM_PYTHON:-}" ]; then
        python_at "${PAM_PYTHON}" && return 0
        echo "error: PAM_PYTHON=${PAM_PYTHON} is not a Python >= 3.12, < 3.14" >&2
        return 1
    fi
    while read -r candidate; do
        python_at "${candidate}" && return 0
    done < <(candidates)
    return 1
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    find_python
fi
