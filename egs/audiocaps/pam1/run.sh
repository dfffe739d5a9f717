#!/usr/bin/env bash
# Captions of sounds: AudioCaps, four frozen encoders, Qwen2.5-3B; see README.md.
#   ./run.sh --version 1 --csv DIR --audio DIR      the official CSVs, and a folder with the clips
#   ./run.sh --version 2 --csv DIR --fetch true     fetch the clips that are still there (days)
# Options of this recipe, besides those of every recipe:
#   --version 1|2         release of the captions (1); data/v<version>
#   --csv DIR             folder with train.csv, val.csv, test.csv, or a clone of the official repository
#                         (downloads/audiocaps)
#   --audio DIR           folder with the clips, any depth ()
#   --fetch BOOL          fetch clips that are in no folder with yt-dlp (false)
#   --fetch_jobs N        downloads at a time (2)
#   --fetch_interval S    seconds between the starts of two downloads (5)
set -euo pipefail
here=${PWD}
cd "$(dirname "${BASH_SOURCE[0]}")"

version=1
data_args=()
rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --version=* | --csv=* | --audio=* | --fetch=* | --fetch_jobs=* | --fetch_interval=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            ;;
        --version | --csv | --audio | --fetch | --fetch_jobs | --fetch_interval)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2 && exit 1; }
            case "$1 $2" in
                "--version "*) version=$2 ;;
                "--csv "[!/]* | "--audio "[!/]*) data_args+=("$1" "${here}/$2") ;; # as seen by who typed it
                *) data_args+=("$1" "$2") ;;
            esac
            shift 2
            ;;
        -h | --help)
            sed -n '/^# Options/,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}"
            echo
            rest+=("$1") && shift
            ;;
        *) rest+=("$1") && shift ;;
    esac
done
exec ../../TEMPLATE/pam1/pam.sh \
    --size "v${version}" \
    --fusion pam \
    --test_sets test \
    --max_seconds 11 \
    --use_cache false \
    --data_args "$(printf '%s\n' --version "${version}" "${data_args[@]}")" \
    "${rest[@]}"
