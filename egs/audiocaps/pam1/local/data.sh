#!/usr/bin/env bash
# Stage 1 of the AudioCaps recipe: data directories from the official CSVs and the clips there are. Run it in the
# recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"

# shellcheck source=egs/audiocaps/pam1/local/options.sh
. local/options.sh

usage="Usage: $0 [options: name, value, default]

Writes <data_dir>/{train,dev,test}. Clips that are missing are listed with the reason in <data_dir>/<set>/missing."
options="
size            NAME     v1         release of the captions: v1 (2019) or v2 (AudioCaps 2.0, 2025)
data_dir        DIR      ''         folder for the data directories (data/<size>)
nj              N        1          given by pam.sh; not needed here
${data_options}"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

if [[ ! ${size} =~ ^v[0-9]+$ ]]; then
    echo "$0: error: --size ${size}: v1 or v2, the release of the captions" >&2
    exit 1
fi
version=${size#v}
csv=${csv:-${downloads}/audiocaps}
data_dir=${data_dir:-data/${size}}

folders=()
[ -z "${audio}" ] || folders+=("${audio}")
hosted=()
if [ -n "${hf}" ]; then
    hosted=(--hosted "${downloads}/hf/${hf//\//-}/${size}")
    "${python}" local/hosted.py --version "${version}" --csv "${csv}" --hf "${hf}" --out "${hosted[1]}"
fi
if [ "${fetch}" = true ]; then
    "${python}" local/fetch.py --version "${version}" --csv "${csv}" --audio "${folders[@]}" "${hosted[@]}" \
        --out "${downloads}/audio" --jobs "${fetch_jobs}" --interval "${fetch_interval}"
fi
[ ! -d "${downloads}/audio" ] || folders+=("${downloads}/audio")
"${python}" local/prepare.py --version "${version}" --csv "${csv}" --audio "${folders[@]}" "${hosted[@]}" \
    --data_dir "${data_dir}" --prompts conf/prompts/caption.txt
