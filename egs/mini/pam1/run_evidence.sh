#!/usr/bin/env bash
# Every way to combine encoders with several seeds on the same data: evidence/<name>_<size>_<seed>.json for each training,
# then EVIDENCE_<size>.md, .json and pictures from these files alone, and the tables in READMEs that quote them.
#   ./run_evidence.sh                                        all fusions, three seeds, quick size: hours
#   ./run_evidence.sh --size full --fusions "pam static"     resumable: a run whose file exists is skipped
#   ./run_evidence.sh --fusions pam --wordings true          pam also asked in wordings that it was not trained on
#   ./run_evidence.sh --variants "scaled:frontend_conf.fusion_conf.gradient=scaled"
#   ./run_evidence.sh --seeds ""                             the tables alone
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage="Usage: ./run_evidence.sh [options: name, value, default]

All rows of the first seed come first, then those of the second. A killed run continues where it stopped."
options="
seeds           NUMBERS  '1 2 3'    separated by blanks
fusions         NAMES    'pam single:whisper single:yamnet single:pyannote average concat static'  as for run.sh; pam is
                                    also decoded without audio
variants        ROWS     ''         further rows of pam, NAME:SETTINGS separated by semicolons, for example
                                    'one:frontend_conf.fusion_conf.num_experts=1; free:model_conf.router_loss_weight=0'
size            NAME     quick      as for run.sh
set             CHANGES  ''         to the configuration of all rows; evidence of other settings is an error
wordings        BOOL     false      pam and its variants are also asked in the wordings of conf/unseen_wordings
options         TEXT     ''         further options of run.sh, separated by blanks
readmes         FILES    'README.md EXPERTS.md EARLY_EXIT.md ../../../README.md'  whose marked tables are made anew
dry_run         BOOL     false      print what would be run, and stop"
# shellcheck source=utils/parse_options.sh
. ../../../utils/parse_options.sh
# shellcheck source=egs/TEMPLATE/pam1/stages.sh
. ../../TEMPLATE/pam1/stages.sh

read -r -a more <<<"${options}"
rows=()
for fusion in ${fusions}; do
    rows+=("${fusion/#single:/single_}:")
done
while IFS= read -r -d ';' row; do
    row="${row#"${row%%[![:space:]]*}"}"
    [ -z "${row}" ] || rows+=("${row}")
done <<<"${variants};"
total=0 number=0 failed=
for seed in ${seeds}; do total=$((total + ${#rows[@]})); done
python=python
if [ "${dry_run}" = false ]; then
    # shellcheck source=egs/TEMPLATE/pam1/path.sh
    . ../../TEMPLATE/pam1/path.sh
fi
for seed in ${seeds}; do
    for row in "${rows[@]}"; do
        name=${row%%:*} number=$((number + 1))
        settings=$(xargs <<<"${set} ${row#*:}")
        fusion=pam
        [[ " ${fusions//single:/single_} " != *" ${name} "* ]] || fusion=${name/#single_/single:}
        file=evidence/${name}_${size}_${seed}.json tag=${name}_${size}_seed${seed}
        echo "=== ${number} of ${total}: ${name}, seed ${seed}, $((SECONDS / 60)) min so far"
        if [ -f "${file}" ]; then
            grep -qxF " \"settings\": \"${settings}\"," "${file}" ||
                fail "${file} has other settings than '${settings}'" "  -> give the row another name (--variants)"
            echo "${file}: done"
            continue
        fi
        is_pam=false
        [ "${fusion}" != pam ] || is_pam=true
        command=(./run.sh --size "${size}" --fusion "${fusion}" --tag "${tag}" --audio_off "${is_pam}"
            --set "seed=${seed}${settings:+ ${settings}}" "${more[@]}")
        [ "${wordings}:${is_pam}" != true:true ] || command+=(--all_prompts true --prompts conf/unseen_wordings)
        if [ "${dry_run}" = true ]; then
            "${command[@]}" --dry_run true
            continue
        fi
        times=exp/${tag}/log/attempts.txt
        mkdir -p "${times%/*}"
        echo begin >>"${times}"
        status=0
        # time's own line goes to the file, and what the command writes there to the screen
        { TIMEFORMAT='%R %U %S' && time "${command[@]}" 2>&3; } 3>&2 2>>"${times}" || status=$?
        ((status < 128)) || exit "${status}" # interrupted
        if ((status > 0)); then
            failed+=" ${tag}"
        else
            module pam_evidence --exp "exp/${tag}" --train "dump/${size}/raw/train" --times "${times}" --name "${name}" \
                --size "${size}" --settings "${settings}"
        fi
    done
done
module pam_evidence --table "${size}"
# shellcheck disable=SC2086  # names
[ -z "${readmes}" ] || module pam_evidence --readme ${readmes}
[ -z "${failed}" ] || fail "failed:${failed}" "  -> the same command tries them again"
