#!/usr/bin/env bash
# Trains, decodes and scores every fusion on the same data with the same seed, and puts them side by side. A recipe's
# script calls it from the recipe's directory with its own --size, --fusions and --title. What is done is skipped, so an
# interrupted comparison goes on where it stopped.
set -euo pipefail

help_message="Usage: ./run_fusions.sh or ./run_ablation.sh [--size NAME] [--fusions NAMES] [--train_config FILES] [--options OPTIONS]

  --size NAME      as for run.sh
  --fusions NAMES  separated by blanks; the first is what the others are compared with, and is decoded
                   without audio too
  --train_config FILES  base configurations, separated by blanks, as for run.sh (conf/train.yaml)
  --tag_suffix TEXT  of the experiments, exp/<fusion>_<size><suffix>, and of the results ()
  --options TEXT   further options of run.sh, separated by blanks; give folders with their whole path ()
  --title TEXT     of the table; SIZE in it stands for the size, without the v of a version
  --dry_run BOOL   print what would be run, and stop (false)

Writes RESULTS_<size><suffix>.md and .json."
size=
fusions=
train_config=conf/train.yaml
tag_suffix=
options=
title=
dry_run=false
template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=utils/parse_options.sh
. "${template}/../../../utils/parse_options.sh"

read -r -a names <<<"${fusions}"
read -r -a more <<<"${options}"
experiments=()
control=true
for fusion in "${names[@]}"; do
    echo "=== ${fusion}"
    ./run.sh --size "${size}" --fusion "${fusion}" --tag "${fusion}_${size}${tag_suffix}" \
        --train_config "${train_config}" --audio_off "${control}" --dry_run "${dry_run}" "${more[@]}"
    experiments+=("exp/${fusion}_${size}${tag_suffix}")
    control=false # the first fusion's answers without audio are control enough
done
report=(-m pam_espnet.bin.pam_score --compare "${experiments[@]}" --output "RESULTS_${size}${tag_suffix}.md"
    --title "${title//SIZE/${size#v}}")
if [ "${dry_run}" = true ]; then
    printf '    python'
    printf ' %q' "${report[@]}"
    echo
    exit 0
fi
# shellcheck source=egs/TEMPLATE/pam1/path.sh
. "${template}/path.sh"
"${python}" "${report[@]}"
