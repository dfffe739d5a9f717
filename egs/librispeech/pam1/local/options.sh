# shellcheck shell=bash
# Sourced by pam.sh: what local/data.sh of this recipe takes, and what it is when nobody says otherwise.
# shellcheck disable=SC2034  # pam.sh reads these
DATA_OPTIONS=(librispeech downloads mirror remove_archives transcripts dev_utterances check_counts seed)
librispeech=
downloads=downloads
mirror=
remove_archives=false
transcripts=lower
dev_utterances=1000
check_counts=true
seed=2026
DATA_HELP="  --librispeech DIR     a copy that is there: DIR/LibriSpeech/test-clean or DIR/test-clean; empty: download ()
  --downloads DIR       where archives and LibriSpeech/ go when they are downloaded (downloads)
  --mirror URL          ask there first; an address that ends where /12/test-clean.tar.gz would follow ()
  --remove_archives BOOL  delete each archive once it is unpacked and complete (false)
  --transcripts CASE    lower, as an LLM would write words without punctuation, or upper, as the corpus has it (lower)
  --dev_utterances N    how many of the dev set are kept for validation in training, 0 for all (1000)
  --check_counts BOOL   stop when utterances or hours are not the published ones; false says so and goes on (true)
  --seed N              of the prompts and of the choice of dev utterances (2026)"
