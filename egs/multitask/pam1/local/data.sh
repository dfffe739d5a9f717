#!/usr/bin/env bash
# Stage 1 of the multitask recipe: the data directories of three recipes, made by their own programs, put together.
# Run it in the recipe's folder.
# shellcheck disable=SC2154  # options are variables that utils/parse_options.sh sets
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"
# shellcheck source=egs/multitask/pam1/local/options.sh
. local/options.sh

usage="Usage: $0 [options: name, value, default]

Writes <data_dir>/{train,dev,test_clean,test_other,test_count,test_verify,test_caption}, and each corpus's own below
<data_dir>/{librispeech,libricount,audiocaps}."
options="
size            NAME     clean100   mini, clean100, clean460 or full960: a size of the LibriSpeech recipe; mixtures for
                                    counting are made of the same speech (of clean460 for full960)
data_dir        DIR      ''         folder for the data directories (data/<size>)
nj              N        $(nproc)   processes
${data_options}"

# shellcheck source=egs/TEMPLATE/pam1/data_options.sh
. "${PAM_ROOT}/egs/TEMPLATE/pam1/data_options.sh"
export python

mixtures=${size}
[ "${size}" != full960 ] || mixtures=clean460
data_dir=${data_dir:-data/${size}}
# The other recipes work in their own folders.
for name in data_dir downloads librispeech libricount noise csv audio; do
    [ -z "${!name:-}" ] || [[ ${!name} == /* ]] || printf -v "${name}" '%s' "${PWD}/${!name}"
done

prepare() {
    # prepare CORPUS SIZE: stage 1 of that recipe, with the options it knows
    local name options=()
    for name in $(table_names "$(corpus_options "$1")"); do
        [ -z "${!name+set}" ] || options+=("--${name}" "${!name}")
    done
    echo "=== $1, size $2"
    (cd "../../$1/pam1" && local/data.sh --size "$2" --data_dir "${data_dir}/$1" --nj "${nj}" "${options[@]}")
}
prepare audiocaps "${captions}"  # first: its captions and clips are the only ones that the user has to bring
prepare librispeech "${size}"
prepare libricount "${mixtures}"

combine() {
    # combine SET DIRECTORIES: no utterance and no speaker may be in two of them
    local target=${data_dir}/$1
    shift
    "${python}" "${PAM_ROOT}/utils/combine_data_dir.py" --distinct_speakers "${target}" "${@/#/${data_dir}/}"
}
echo "=== together"
for name in train dev; do
    combine "${name}" "librispeech/${name}" "libricount/${name}" "audiocaps/${name}"
done
for name in test_clean test_other; do
    combine "${name}" "librispeech/${name}"
done
for name in ${framings:-}; do
    combine "test_${name}" "libricount/test_${name}"
done
combine test_caption audiocaps/test
"${python}" ../../libricount/pam1/local/check_leak.py --librispeech "${librispeech:-${downloads}}" \
    --data "${data_dir}/train" "${data_dir}/dev"
