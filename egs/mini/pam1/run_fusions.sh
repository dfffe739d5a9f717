#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_fusions.sh                      quick size; writes RESULTS_quick.md and .json
#   ./run_fusions.sh --size full          full size; writes RESULTS_full.md and .json
#   ./run_fusions.sh --fusions "pam static"
# What is done is skipped, so an interrupted comparison goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help_message="Usage: ./run_fusions.sh [--size quick] [--fusions NAMES] [--options OPTIONS]

  --size NAME      as for run.sh (quick)
  --fusions NAMES  separated by blanks; the first is what the others are compared with, and is decoded
                   without audio too
  --options TEXT   further options of run.sh, separated by blanks ()"
size=quick
fusions="pam single_whisper single_yamnet single_pyannote average concat static"
options=
# shellcheck source=utils/parse_options.sh
. ../../../utils/parse_options.sh

read -r -a names <<<"${fusions}"
read -r -a more <<<"${options}"
experiments=()
control=true
for fusion in "${names[@]}"; do
    echo "=== ${fusion}"
    ./run.sh --size "${size}" --fusion "${fusion}" --audio_off "${control}" "${more[@]}"
    experiments+=("exp/${fusion}_${size}")
    control=false # the first fusion's answers without audio are control enough
done
# shellcheck source=egs/TEMPLATE/pam1/path.sh
. ../../TEMPLATE/pam1/path.sh
"${python}" -m pam_espnet.bin.pam_report --compare "${experiments[@]}" --output "RESULTS_${size}.md" \
    --title "Mini corpus, size ${size}: ways to combine encoders"
