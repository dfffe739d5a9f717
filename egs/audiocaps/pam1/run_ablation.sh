#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_ablation.sh --options "--version 1 --csv DIR --audio DIR --ngpu 1"     writes RESULTS_v1.md and .json
# What is done is skipped, so an interrupted comparison goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help_message="Usage: ./run_ablation.sh [--version 1] [--fusions NAMES] [--options OPTIONS]

  --version 1|2    as for run.sh (1)
  --fusions NAMES  separated by blanks; the first is what the others are compared with, and is decoded
                   without audio too
  --options TEXT   further options of run.sh, separated by blanks; give folders with their whole path ()"
version=1
fusions="pam single_whisper single_wavlm single_wav2vec2 single_ast average concat static"
options=
# shellcheck source=utils/parse_options.sh
. ../../../utils/parse_options.sh

read -r -a names <<<"${fusions}"
read -r -a more <<<"${options}"
experiments=()
control=true
for fusion in "${names[@]}"; do
    echo "=== ${fusion}"
    ./run.sh --version "${version}" --fusion "${fusion}" --audio_off "${control}" "${more[@]}"
    experiments+=("exp/${fusion}_v${version}")
    control=false # the first fusion's answers without audio are control enough
done
# shellcheck source=egs/TEMPLATE/pam1/path.sh
. ../../TEMPLATE/pam1/path.sh
"${python}" -m pam_espnet.bin.pam_report --compare "${experiments[@]}" --output "RESULTS_v${version}.md" \
    --title "AudioCaps ${version}.0: ways to combine encoders"
