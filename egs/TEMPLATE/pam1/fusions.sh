#!/usr/bin/env bash
# Trains, decodes and scores every fusion on the same data with the same seed, and puts them side by side. A recipe's
# script calls it from the recipe's directory with its own --size, --fusions and --title. What is done is skipped, so an
# interrupted comparison continues where it stopped.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

template=$(dirname "${BASH_SOURCE[0]}")
usage="Usage: ./run_ablation.sh [options: name, value, default]

Writes RESULTS_<size><suffix>.md and .json."
options="
size            NAME     ''         as for run.sh
fusions         NAMES    ''         separated by blanks; the first is what the others are compared with, and is decoded
                                    without audio too
train_config    FILES    conf/train.yaml  base configurations, separated by blanks, as for run.sh
tag_suffix      TEXT     ''         of the experiments, exp/<fusion>_<size><suffix>, and of the results
options         TEXT     ''         further options of run.sh, separated by blanks; give folders with their whole path
title           TEXT     ''         of the table; SIZE in it stands for the size, without the v of a version
dry_run         BOOL     false      print what would be run, and stop"
# shellcheck source=utils/parse_options.sh
. "${template}/../../../utils/parse_options.sh"
# shellcheck source=egs/TEMPLATE/pam1/stages.sh
. "${template}/stages.sh"

# shellcheck disable=SC2162  # without -r, so that a blank may be written within a word: "\ "
read -a more <<<"${options}"
read -r -a names <<<"${fusions}"
experiments=()
control=true
for fusion in "${names[@]}"; do
    echo "=== ${fusion}"
    tag=${fusion/#single:/single_}_${size}${tag_suffix}
    ./run.sh --size "${size}" --fusion "${fusion}" --tag "${tag}" \
        --train_config "${train_config}" --audio_off "${control}" --dry_run "${dry_run}" "${more[@]}"
    experiments+=("exp/${tag}")
    control=false # the first fusion's answers without audio are control enough
done
python=python
if [ "${dry_run}" = false ]; then
    # shellcheck source=egs/TEMPLATE/pam1/path.sh
    . "${template}/path.sh"
fi
module pam_score --compare "${experiments[@]}" --output "RESULTS_${size}${tag_suffix}.md" --title "${title//SIZE/${size#v}}"
