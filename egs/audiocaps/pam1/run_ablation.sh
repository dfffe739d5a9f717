#!/usr/bin/env bash
# Train, decode and score every fusion on the same data with the same seed, and put them side by side.
#   ./run_ablation.sh --size v1 --options "--csv DIR --audio DIR --ngpu 1"     writes RESULTS_v1.md and .json
# What is done is skipped, so an interrupted comparison goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

help_message="Usage: ./run_ablation.sh [--size v1] [--fusions NAMES] [--options OPTIONS]

  --size v1|v2     release of the captions (v1)
  --fusions NAMES  separated by blanks; the first is what the others are compared with, and is decoded
                   without audio too
  --options TEXT   further options of run.sh, separated by blanks; give folders with their whole path ()"
size=v1
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
    ./run.sh --size "${size}" --fusion "${fusion}" --audio_off "${control}" "${more[@]}"
    experiments+=("exp/${fusion}_${size}")
    control=false # the first fusion's answers without audio are control enough
done
# shellcheck source=egs/TEMPLATE/pam1/path.sh
. ../../TEMPLATE/pam1/path.sh
"${python}" -m pam_espnet.bin.pam_report --compare "${experiments[@]}" --output "RESULTS_${size}.md" \
    --title "AudioCaps ${size#v}.0: ways to combine encoders"
