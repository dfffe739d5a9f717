# shellcheck shell=bash
# Sourced by pam.sh: what local/data.sh of this recipe takes, and what it is when nobody says otherwise.
# shellcheck disable=SC2034  # pam.sh reads these
DATA_OPTIONS=(librispeech libricount noise downloads mirror remove_archives framings folds check_counts seed)
librispeech=
libricount=
noise=
downloads=downloads
mirror=
remove_archives=false
framings="count verify"
folds=false
check_counts=true
seed=2026
DATA_HELP="  --librispeech DIR     a copy that is there: DIR/LibriSpeech/train-clean-100 or DIR/train-clean-100; empty: download ()
  --libricount DIR      a copy that is there: the folder with 3_<name>.wav, or the one above it; empty: download ()
  --noise DIR           recordings without speech, for training clips with nobody in them; empty: made noise ()
  --downloads DIR       where downloads go (downloads)
  --mirror URL          OpenSLR's mirror to ask first, see the LibriSpeech recipe ()
  --remove_archives BOOL  delete each archive once it is unpacked and complete (false)
  --framings TASKS      count (how many?), verify (is it so many? yes or no), or both (count verify)
  --folds BOOL          also write LibriCount in five folds, {train,dev,test}_fold<0..4> (false)
  --check_counts BOOL   stop when a corpus does not have as many clips as published; false says so and goes on (true)
  --seed N              of everything random (2026)"
