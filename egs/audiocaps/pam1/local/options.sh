# shellcheck shell=bash
# Sourced by pam.sh: what local/data.sh of this recipe takes, and what it is when nobody says otherwise.
# shellcheck disable=SC2034  # pam.sh reads these
DATA_OPTIONS=(csv audio fetch fetch_jobs fetch_interval downloads)
csv=
audio=
fetch=false
fetch_jobs=2
fetch_interval=5
downloads=downloads
DATA_HELP="  --csv DIR             folder with train.csv, val.csv and test.csv, or a clone of the official repository
                        (<downloads>/audiocaps)
  --audio DIR           folder with the clips, any depth: <youtube_id>, Y<youtube_id>, <youtube_id>_<start> or
                        <audiocap_id>, as wav, flac, mp3, m4a, webm, ... ()
  --fetch BOOL          fetch clips that are in no folder with yt-dlp, into <downloads>/audio (false)
  --fetch_jobs N        downloads at a time (2)
  --fetch_interval S    seconds between the starts of two downloads (5)
  --downloads DIR       what is fetched, and where the CSVs are looked for (downloads)"
