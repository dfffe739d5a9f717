# shellcheck shell=bash
# Sourced by a recipe's local/data.sh once PAM_ROOT, usage and options are set: reads the command line, and finds Python.

# shellcheck source=utils/parse_options.sh
. "${PAM_ROOT}/utils/parse_options.sh"

if [ $# -ne 0 ]; then
    echo "$0: error: unexpected argument '$1'" >&2
    echo "  -> --help shows what there is" >&2
    exit 1
fi

# path.sh of the recipe template exports the interpreter; alone, the script takes the project's
if [ -z "${python:-}" ]; then
    python="${PAM_ROOT}/.venv/bin/python"
    [ -x "${python}" ] || python=python3
fi
