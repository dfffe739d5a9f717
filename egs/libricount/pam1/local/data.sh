#!/usr/bin/env bash
# Stage 1 of the LibriCount recipe: download what is missing, mix the training clips. Run it in the recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"
# shellcheck source=egs/libricount/pam1/local/options.sh
. local/options.sh

usage="Usage: $0 [options: name, value, default]

Writes <data_dir>/{train,dev,test_count,test_verify,audio}. What is there already is kept."
options="
size            NAME     clean100   mini, clean100 or clean460, see local/sizes.yaml
data_dir        DIR      ''         folder for the data directories (data/<size>)
nj              N        $(nproc)   processes
${data_options}"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

if [ -z "${libricount}" ]; then
    "${python}" local/download.py --downloads "${downloads}" --remove_archive "${remove_archives}"
    libricount=${downloads}/LibriCount10-0dB
fi
if [ -z "${librispeech}" ]; then
    listed=$("${python}" local/prepare.py --size "${size}" --list_subsets true)
    read -r -a subsets <<<"${listed}"
    "${python}" ../../librispeech/pam1/local/download.py --downloads "${downloads}" --subsets "${subsets[@]}" \
        --mirror "${mirror}" --remove_archives "${remove_archives}"
    librispeech=${downloads}
fi
read -r -a tasks <<<"${framings}"
"${python}" local/prepare.py --librispeech "${librispeech}" --libricount "${libricount}" --size "${size}" \
    --data_dir "${data_dir:-data/${size}}" --noise "${noise}" --framings "${tasks[@]}" --folds "${folds}" \
    --check_counts "${check_counts}" --seed "${seed}" --jobs "${nj}"
