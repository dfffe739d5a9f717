#!/usr/bin/env bash
# Stage 1 of the AudioCaps recipe: data directories from the official CSVs and the clips there are. Run it in the
# recipe's folder.
set -euo pipefail

PAM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../../.." && pwd)"

help_message="Usage: $0 [--version 1|2] [--csv DIR] [--audio DIR] [--fetch true] [--data_dir data/v<version>]
  --version         release of the captions: 1 (2019) or 2 (AudioCaps 2.0, 2025)
  --csv             folder with train.csv, val.csv and test.csv, or a clone of the official repository
                    (downloads/audiocaps)
  --audio           folder with the clips, any depth: <youtube_id>, Y<youtube_id>, <youtube_id>_<start> or
                    <audiocap_id>, as wav, flac, mp3, m4a, webm, ...
  --fetch           fetch clips that are in no folder with yt-dlp, into <downloads>/audio (false)
  --fetch_jobs      downloads at a time (2)
  --fetch_interval  seconds between the starts of two downloads (5)
  --downloads       (downloads)
  --data_dir        folder for the data directories (data/v<version>)
  --size, --nj      given by pam.sh; not needed here
Writes <data_dir>/{train,dev,test}. Clips that are missing are listed with the reason in <data_dir>/<set>/missing."

version=1
csv=
audio=
fetch=false
fetch_jobs=2
fetch_interval=5
downloads=downloads
data_dir=
size=
# shellcheck disable=SC2034  # pam.sh gives it to every recipe; there is nothing to share out here
nj=1

# shellcheck source=utils/parse_options.sh
. "${PAM_ROOT}/utils/parse_options.sh"

if [ $# -ne 0 ]; then
    echo "$0: error: unexpected argument '$1'" >&2
    echo "${help_message}" >&2
    exit 1
fi
csv=${csv:-${downloads}/audiocaps}
data_dir=${data_dir:-data/${size:-v${version}}}

# path.sh of the recipe template exports the interpreter; alone, this script takes the project's
if [ -z "${python:-}" ]; then
    python="${PAM_ROOT}/.venv/bin/python"
    [ -x "${python}" ] || python=python3
fi

folders=()
[ -z "${audio}" ] || folders+=("${audio}")
if [ "${fetch}" = true ]; then
    "${python}" local/fetch.py --version "${version}" --csv "${csv}" --audio "${folders[@]}" \
        --out "${downloads}/audio" --jobs "${fetch_jobs}" --interval "${fetch_interval}"
fi
[ ! -d "${downloads}/audio" ] || folders+=("${downloads}/audio")
"${python}" local/prepare.py --version "${version}" --csv "${csv}" --audio "${folders[@]}" \
    --data_dir "${data_dir}" --prompts conf/prompts/caption.txt
