#!/usr/bin/env bash
# shellcheck disable=SC2154  # usage and options are the caller's
# Options of a script from one table, which is its help as well. Source it after setting `usage` and `options`:
#
#     usage="Usage: $0 [options]"
#     options="
#     stage      N      1      first stage
#     test_sets  NAMES  'a b'  separated by blanks
#                              (other lines, such as this one, belong to the help alone)
#     "
#     . utils/parse_options.sh
#
# A line has a name, what its value is, the default (in single quotes where it is empty or has blanks) and the help. Each
# name becomes a variable with its default; `--name value` and `--name=value` set it (a dash in it stands for an
# underscore). BOOL takes true or false, N a whole number, anything else any text. Parsing ends at `--` or at the first
# word that is no option; what follows stays in "$@". Values are never executed. `table_names TABLE` prints its names.

table_names() { sed -n 's/^\([a-z][A-Za-z0-9_]*\) .*/\1/p' <<<"$1"; }

_po_fail() {
    printf '%s: error: %s\n' "$0" "$1" >&2
    [ $# -lt 2 ] || printf '  -> %s\n' "$2" >&2
    exit 1
}

# _po_close A B: whether B may be meant by A: its beginning or last word, or at most two letters are different.
_po_close() {
    local i j cost best above=() row=()
    [[ $2 != "$1"* && $2 != *"_$1" ]] || return 0
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
    ((above[${#2}] <= 2 && above[${#2}] < ${#1}))
}

declare -A _po_kinds=()
_po_pattern="^([a-z][A-Za-z0-9_]*) +([^ ]+) +('([^']*)'|([^ ]+))( |\$)"
while IFS= read -r _po_line; do
    [[ ${_po_line} =~ ${_po_pattern} ]] || continue
    _po_kinds[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    printf -v "${BASH_REMATCH[1]}" '%s' "${BASH_REMATCH[4]}${BASH_REMATCH[5]}"
done <<<"${options}"

while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help)
            printf '%s\n' "${usage}"
            sed 's/^\([a-z][A-Za-z0-9_]* \)/  --\1/; s/^    /        /' <<<"${options}"
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
            if [[ ! ${_po_name} =~ ^[a-z][A-Za-z0-9_]*$ || -z ${_po_kinds[${_po_name}]:-} ]]; then
                _po_value=
                for _po_line in "${!_po_kinds[@]}"; do
                    ! _po_close "${_po_name}" "${_po_line}" || _po_value+="--${_po_line} "
                done
                [ -z "${_po_value}" ] || _po_fail "unknown option --${_po_name}" "did you mean ${_po_value}?"
                _po_fail "unknown option --${_po_name}" "--help shows what there is"
            fi
            case "${_po_kinds[${_po_name}]}:${_po_value}" in
                BOOL:true | BOOL:false) ;;
                BOOL:*) _po_fail "--${_po_name} takes true or false, not '${_po_value}'" ;;
                N: | N:*[!0-9]*) _po_fail "--${_po_name} must be a whole number, not '${_po_value}'" ;;
            esac
            printf -v "${_po_name}" '%s' "${_po_value}"
            ;;
        -?*) _po_fail "unknown option $1" "options have two dashes; --help shows what there is" ;;
        *) break ;;
    esac
done
unset -f _po_fail _po_close
unset -v _po_name _po_kinds _po_value _po_line _po_pattern
