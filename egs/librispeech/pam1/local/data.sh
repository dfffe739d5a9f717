#!/usr/bin/env bash
# Stage 1 of the LibriSpeech recipe: download what is missing, write the data directories. Run it in the recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"
# shellcheck source=egs/librispeech/pam1/local/options.sh
. local/options.sh

usage="Usage: $0 [options: name, value, default]

Writes <data_dir>/{train,dev,test_clean,test_other}. What is there already is kept."
options="
size            NAME     clean100   mini, clean100, clean460 or full960, see local/sizes.yaml
data_dir        DIR      ''         folder for the data directories (data/<size>)
nj              N        $(nproc)   threads that read file headers
${data_options}"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

if [ -z "${librispeech}" ]; then
    "${python}" local/download.py --downloads "${downloads}" --size "${size}" --mirror "${mirror}" \
        --remove_archives "${remove_archives}"
    librispeech=${downloads}
fi
"${python}" local/prepare.py --librispeech "${librispeech}" --size "${size}" --data_dir "${data_dir:-data/${size}}" \
    --transcripts "${transcripts}" --dev_utterances "${dev_utterances}" --check_counts "${check_counts}" \
    --seed "${seed}" --jobs "${nj}"
