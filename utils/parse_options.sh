#!/usr/bin/env bash
# Options of a script from its own variables. Source it after the variables got their defaults:
#
#     help_message="Usage: $0 [--stage 1] [--dry_run true|false]"
#     stage=1
#     dry_run=false
#     . utils/parse_options.sh
#
# Then `--name value` and `--name=value` set the variable `name` (a dash in it stands for an underscore); only variables
# that exist and begin with a small letter can be set. A variable whose default is true or false takes nothing else.
# Parsing ends at `--` or at the first word that is no option; what follows stays in "$@". Values are never executed.

_po_fail() {
    printf '%s: error: %s\n' "$0" "$1" >&2
    [ $# -lt 2 ] || printf '  -> %s\n' "$2" >&2
    exit 1
}

# _po_distance A B: sets _po_result to the number of letters to insert, delete or replace between the two words.
_po_distance() {
    local i j cost best above=() row=()
    for ((j = 0; j <= ${#2}; j++)); do above[j]=${j}; done
    for ((i = 1; i <= ${#1}; i++)); do
        row=("${i}")
        for ((j = 1; j <= ${#2}; j++)); do
            cost=1
            [ "${1:i-1:1}" != "${2:j-1:1}" ] || cost=0
            best=$((above[j - 1] + cost))
            ((above[j] + 1 >= best)) || best=$((above[j] + 1))
            ((row[j - 1] + 1 >= best)) || best=$((row[j - 1] + 1))
            row[j]=${best}
        done
        above=("${row[@]}")
    done
    _po_result=${above[${#2}]}
}

# _po_unknown NAME: ends the script, naming the options that NAME may have been meant to be.
_po_unknown() {
    local name close=()
    while read -r name; do
        case "${name}" in
            "$1"* | *"_$1") close+=("--${name}") ;;  # its beginning or its last word is right
            [a-z]*)
                _po_distance "$1" "${name}"
                ((_po_result > 2 || _po_result >= ${#1})) || close+=("--${name}")
                ;;
        esac
    done < <(LC_ALL=C comm -23 <(compgen -A variable | LC_ALL=C sort) <(compgen -e | LC_ALL=C sort))
    if [ ${#close[@]} -gt 0 ]; then
        _po_fail "unknown option --$1" "did you mean ${close[*]} ?"
    fi
    _po_fail "unknown option --$1" "--help shows what there is"
}

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            printf '%s\n' "${help_message:-$0 has no help_message}"
            exit 0
            ;;
        --)
            shift
            break
            ;;
        --*)
            _po_name=${1#--}
            if [[ ${_po_name} == *=* ]]; then
                _po_value=${_po_name#*=}
                _po_name=${_po_name%%=*}
                shift
            else
                [ $# -ge 2 ] || _po_fail "$1 needs a value"
                _po_value=$2
                shift 2
            fi
            _po_name=${_po_name//-/_}
            [[ ${_po_name} =~ ^[a-z][A-Za-z0-9_]*$ ]] || _po_fail "--${_po_name} is not the name of an option"
            [ -n "${!_po_name+set}" ] || _po_unknown "${_po_name}"
            if [[ ${!_po_name} =~ ^(true|false)$ && ! ${_po_value} =~ ^(true|false)$ ]]; then
                _po_fail "--${_po_name} takes true or false, not '${_po_value}'"
            fi
            printf -v "${_po_name}" '%s' "${_po_value}"
            ;;
        -?*) _po_fail "unknown option $1" "options have two dashes; --help shows what there is" ;;
        *) break ;;
    esac
done
unset -f _po_fail _po_distance _po_unknown
unset -v _po_name _po_value _po_result
