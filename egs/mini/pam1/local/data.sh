#!/usr/bin/env bash
# Stage 1 of the mini recipe: download the packages, convert the models, make the corpus. Run it in the recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"

usage="Usage: $0 [options: name, value, default]

Writes <downloads>/{packages,unpacked,models} and
<data_dir>/{train,dev,test_asr,test_voices,test_count,test_caption,audio}.
What is there already is kept."
options="
size            NAME     quick      how much to make, see local/sizes.yaml: tiny, quick or full
data_dir        DIR      ''         folder for the corpus (data/<size>)
nj              N        $(nproc)   processes
downloads       DIR      downloads  folder for packages, what is unpacked of them, and models (about 2 GB)
seed            N        2026       of everything random"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

data_dir="${data_dir:-data/${size}}"

"${python}" local/download.py --downloads "${downloads}" --size "${size}"
"${python}" local/models.py --downloads "${downloads}"
"${python}" local/prepare.py --downloads "${downloads}" --size "${size}" --data_dir "${data_dir}" \
    --jobs "${nj}" --seed "${seed}"
