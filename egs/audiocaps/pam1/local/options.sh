# shellcheck shell=bash
# Sourced by pam.sh and local/data.sh: what local/data.sh of this recipe takes, a table for utils/parse_options.sh.
# shellcheck disable=SC2034
data_options="
csv             DIR      ''         folder with train.csv, val.csv and test.csv, or a clone of the official repository;
                                    empty: <downloads>/audiocaps
audio           DIR      '${AUDIOCAPS:-}'         folder with the clips, any depth: <youtube_id>, Y<youtube_id>, <youtube_id>_<start>
                                    or <audiocap_id>, as wav, flac, mp3, m4a, webm, ...
hf              NAME     ''         Hugging Face dataset with the clips: owner/name of the hub, owner/name@commit, or a
                                    folder of parquet files; needs tools/setup.sh --extras import
fetch           BOOL     false      fetch clips that are in no folder with yt-dlp, into <downloads>/audio
fetch_jobs      N        2          downloads at a time
fetch_interval  S        5          seconds between the starts of two downloads
downloads       DIR      downloads  what is fetched, and where the CSVs are looked for"
