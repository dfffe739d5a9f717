#!/usr/bin/env bash
# All stages of a PaM recipe, once. A recipe's run.sh calls it from the recipe's directory with its own defaults.
set -euo pipefail

# What local/data.sh of a recipe takes beside --size, --data_dir and --nj: local/options.sh lists the names, sets a
# variable of each name to its default, and describes them.
DATA_OPTIONS=()
DATA_HELP=
# shellcheck source=/dev/null
[ ! -f local/options.sh ] || . local/options.sh

help_message="Usage: ./run.sh [options]

Stages
  1 data        fetch corpora and models, write data/<size>/<set>             (local/data.sh)
  2 format      validate; 16 kHz copies with passports in dump/<size>/raw
  3 train       feature cache, CTC warm start, training                       -> exp/<tag>
  4 decode      beam search on the test sets, with and without audio          -> exp/<tag>/decode_*
  5 score       scores with intervals, RESULTS.md, results.json, pictures     -> exp/<tag>
  6 pack        one file for another machine; only when asked for             -> exp/<tag>/<tag>.zip
  7 demo        a page in the browser that answers with it, until Ctrl-C; needs tools/setup.sh --extras demo

Options (default)
  --stage N             first stage (1)
  --stop_stage N        last stage (5)
  --dry_run BOOL        print what would be run, and stop (false)
  --size NAME           size of the corpus and of the training: conf/size/<name>.yaml (quick)
  --fusion NAME         how encoders are combined: conf/fusion/<name>.yaml (pam)
  --tag NAME            experiment directory exp/<tag> (<fusion>_<size>)
  --train_config FILES  base configurations, separated by blanks (conf/train.yaml)
  --set CHANGES         changes to the configuration, key.sub=value separated by blanks ()
  --decode_config FILE  options of the beam search (conf/decode.yaml)
  --decode_tag NAME     decode directory exp/<tag>/decode_<name> (beam)
  --audio_off BOOL      also decode with the waveform set to zero, as control (true)
  --all_prompts BOOL    also decode with every other wording of conf/prompts/<task>.txt, and report the spread (false)
  --use_cache BOOL      train on cached hidden states; false runs the encoders in every step (true)
  --rebuild_cache BOOL  compute cached hidden states again (false)
  --warm_start BOOL     CTC warm start of the adapters before training (true)
  --select NAME         the model that is kept: loss, ESPnet's average of its best epochs; or scores, the epoch of those
                        kept whose answers to the validation set score best, all tasks counting the same (loss)
  --train_set NAME      (train)
  --valid_set NAME      (dev)
  --test_sets NAMES     separated by blanks (test_asr test_count test_caption)
  --max_seconds N       longer utterances are skipped, and listed (30)
  --nj N                parallel processes where work is split (number of cores, at most 8)
  --ngpu N              GPUs for training; 0 = CPU (0)
  --cmd NAME            where the jobs of stages 3 and 4 run: local (this machine) or slurm (see cmd.sh; \$PAM_CMD or local)
  --decode_nj N         processes that decode, each with the whole model (--nj; with --ngpu one,
                        and each has a GPU of its own)
  --batch_size N        utterances decoded together (8)
  --decode_dtype NAME   precision of the LLM in decoding: float32, bfloat16, or int8 (the search's weights alone, on
                        x86 CPUs); see conf/decode.yaml (float32)
${DATA_HELP:+
Options of the data of this recipe; relative paths start at its folder
${DATA_HELP}
}
A second run skips what is done; a killed one goes on where it stopped."
preset=
for word in "$@"; do
    case "${word}" in -h | --help) break ;; esac
    preset+=" $(printf '%q' "${word}")"
done
[ -z "${preset}" ] || help_message+="
Given already, by this recipe's run.sh or by you, in place of the defaults above:
 ${preset}"

stage=1
stop_stage=5
dry_run=false
size=quick
fusion=pam
tag=
train_config=conf/train.yaml
set=
decode_config=conf/decode.yaml
decode_tag=beam
audio_off=true
all_prompts=false
use_cache=true
rebuild_cache=false
warm_start=true
select=loss
train_set=train
valid_set=dev
test_sets="test_asr test_count test_caption"
max_seconds=30
nj=$(nproc 2>/dev/null || echo 1)
((nj <= 8)) || nj=8
ngpu=0
cmd=${PAM_CMD:-local}
decode_nj=
batch_size=8
decode_dtype=float32

template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PAM_COMMAND="./run.sh $*"  # kept beside the results
# shellcheck source=utils/parse_options.sh
. "${template}/../../../utils/parse_options.sh"

fail() {
    printf 'error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '%s\n' "${@:2}" >&2
    exit 1
}
[ $# -eq 0 ] || fail "unexpected word '$1'" "  -> options look like --stage 1; --help lists them"
[ -n "${decode_nj}" ] || { [ "${ngpu}" = 0 ] && decode_nj=${nj}; } || decode_nj=1
for number in stage stop_stage nj ngpu decode_nj batch_size; do
    [[ ${!number} =~ ^[0-9]+$ ]] || fail "--${number} must be a whole number, not '${!number}'"
done
((nj > 0 && decode_nj > 0 && batch_size > 0)) || fail "--nj, --decode_nj and --batch_size must be at least 1"
[[ ${select} =~ ^(loss|scores)$ ]] || fail "--select takes loss or scores, not '${select}'"
[ -d conf ] || fail "no conf/ here: call pam.sh through the run.sh of a recipe"

tag=${tag:-${fusion}_${size}}
device=cpu
((ngpu == 0)) || device=cuda
data=data/${size}
dump=dump/${size}
exp=exp/${tag}
read -r -a configs <<<"${train_config}"
for overlay in "conf/fusion/${fusion}.yaml" "conf/size/${size}.yaml"; do
    [ -f "${overlay}" ] || fail "${overlay}: no such file" "  -> there are: $(echo "${overlay%/*}"/*.yaml)"
    configs+=("${overlay}")
done
read -r -a changes <<<"${set}"
read -r -a tests <<<"${test_sets}"

if [ "${dry_run}" = false ]; then
    # shellcheck source=egs/TEMPLATE/pam1/path.sh
    . "${template}/path.sh"
else
    python=python
    PAM_ROOT=$(cd "${template}/../../.." && pwd)
fi
# shellcheck source=egs/TEMPLATE/pam1/cmd.sh
. "${template}/cmd.sh"
read -r -a train_run <<<"${train_cmd}"
read -r -a decode_run <<<"${decode_cmd}"
((ngpu == 0)) || decode_run+=(--gpu 1)

run() {
    # Run a command, or print it in a dry run.
    if [ "${dry_run}" = true ]; then
        printf '    '
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
module() { run "${python}" -m "pam_espnet.bin.$1" "${@:2}"; }

begin() {
    # begin N NAME READS WRITES
    stage_name="stage $1 ($2)"
    echo "== ${stage_name}: reads $3; writes $4"
    stage_start=${SECONDS}
}
end() {
    [ "${dry_run}" = true ] || echo "== ${stage_name}: done in $((SECONDS - stage_start)) s; next: $1"
}
needs() {
    # needs PATH STAGES: PATH is made by an earlier stage
    [ "${dry_run}" = true ] || [ -e "$1" ] || fail "${stage_name}: there is no $1" "  -> first the same command with $2"
}
wants() { ((stage <= $1 && $1 <= stop_stage)); }

background() {
    # background FOLLOWED LOGS COMMAND...: run COMMAND; meanwhile show the file FOLLOWED, in which it draws its bar.
    # Ctrl-C or a kill of this script ends COMMAND and its children (it is started in a process group of its own).
    local followed=$1 logs=$2 pid status=0
    shift 2
    if [ "${dry_run}" = true ]; then
        run "$@"
        return
    fi
    mkdir -p "$(dirname "${followed}")"
    : >"${followed}"
    set -m
    "$@" &
    pid=$!
    set +m
    # shellcheck disable=SC2064  # the process of now, not of later
    trap "kill -TERM -- -${pid} 2>/dev/null || true; wait; exit 130" INT TERM HUP
    tail -n +1 -s 0.5 -f --pid="${pid}" "${followed}" 2>/dev/null &
    wait "${pid}" || status=$?
    trap - INT TERM HUP
    wait
    ((status == 0)) || fail "${stage_name} failed (status ${status}); logs: ${logs}" \
        "  -> run the same command again to go on where it stopped"
}

if wants 1; then
    begin 1 data "local/ (packages and their checksums)" "downloads/, ${data}/"
    run "${python}" "${PAM_ROOT}/tools/check_install.py" --config "conf/size/${size}.yaml"
    data_command=(local/data.sh --size "${size}" --data_dir "${data}" --nj "${nj}")
    for option in "${DATA_OPTIONS[@]}"; do
        data_command+=("--${option}" "${!option}")
    done
    run "${data_command[@]}"
    end "the same command with --stage 2"
fi

if wants 2; then
    begin 2 format "${data}/" "${dump}/raw/"
    for set_name in "${train_set}" "${valid_set}" "${tests[@]}"; do
        run "${python}" "${PAM_ROOT}/utils/validate_data_dir.py" "${data}/${set_name}"
        module pam_format "${data}/${set_name}" "${dump}/raw/${set_name}" --jobs "${nj}" --max-seconds "${max_seconds}"
    done
    end "the same command with --stage 3"
fi

if wants 3; then
    begin 3 train "${dump}/raw/, ${configs[*]}" "${dump}/feats/, ${exp}/"
    if [ -f local/check_train.py ]; then  # a recipe's own reasons to refuse a training set
        needs "${data}/${train_set}" "--stage 1 --stop_stage 2"
        run "${python}" local/check_train.py --train "${data}/${train_set}" "${data}/${valid_set}" \
            --tests "${tests[@]/#/${data}/}"
    fi
    needs "${dump}/raw/${train_set}" "--stage 1 --stop_stage 2"
    mkdir_exp=(mkdir -p "${exp}/log")
    run "${mkdir_exp[@]}"
    if [ "${warm_start}" = true ]; then
        changes+=("model_conf.ctc_tokens=${exp}/ctc_tokens.txt")
    else
        changes+=("model_conf.ctc_weight=0")  # there is no head to train on
    fi
    module pam_config --config "${configs[@]}" --set "${changes[@]}" --experiment "${exp}" \
        --data "${dump}/raw/${train_set}" "${dump}/raw/${valid_set}" --out "${exp}/model.yaml"
    [ -f "${exp}/model.safetensors" ] || module pam_estimate --config "${exp}/model.yaml" --ngpu "${ngpu}" \
        --fetch true --use_cache "${use_cache}" --data "${dump}/raw/${train_set}" "${dump}/raw/${valid_set}" ||
        echo "warning: there is no estimate of memory and time; training goes on" >&2
    encoders=(ENCODER)
    if [ "${dry_run}" = false ]; then
        listed=$("${python}" -m pam_espnet.bin.pam_config --config "${exp}/model.yaml" --list_encoders)
        mapfile -t encoders <<<"${listed}"
    fi
    data_args=()
    for mode in train valid; do
        set_name=${train_set}
        [ "${mode}" = train ] || set_name=${valid_set}
        raw=${dump}/raw/${set_name}
        for stream in text,text,text prompt,prompt,text utt2task,task,text utt2num_samples,num_samples,text_int; do
            data_args+=("--${mode}_data_path_and_name_and_type" "${raw}/${stream}")
        done
        if [ "${use_cache}" = true ]; then
            for encoder in "${encoders[@]}"; do
                scp=${dump}/feats/${encoder}/${set_name}/feats.scp
                data_args+=("--${mode}_data_path_and_name_and_type" "${scp},feats_${encoder},kaldi_ark")
            done
        else
            data_args+=("--${mode}_data_path_and_name_and_type" "${raw}/wav.scp,speech,sound")
        fi
    done
    specs=()
    if [ "${use_cache}" = true ]; then
        # One encoder per process and thread: small models gain little from a second thread.
        background "${exp}/log/cache.1.log" "${exp}/log/cache.*.log" \
            "${decode_run[@]}" --max-jobs-run "${nj}" JOB=1:"${#encoders[@]}" "${exp}/log/cache.JOB.log" \
            "${python}" -m pam_espnet.bin.pam_cache_features --config "${exp}/model.yaml" --encoder JOB --threads 1 \
            --device "${device}" --out "${dump}/feats" --data "${dump}/raw/${train_set}" "${dump}/raw/${valid_set}" \
            --rebuild "${rebuild_cache}"
        specs=(--specs "${dump}/feats")
    fi
    module pam_config --config "${exp}/model.yaml" "${specs[@]}" --out "${exp}/train.yaml"
    train_args=(--config "${exp}/train.yaml" --output_dir "${exp}" "${data_args[@]}")
    if [ "${warm_start}" = true ]; then
        background "${exp}/log/warm_start.log" "${exp}/log/warm_start.log" \
            "${train_run[@]}" --gpu "${ngpu}" "${exp}/log/warm_start.log" \
            "${python}" -m pam_espnet.bin.pam_warm_start "${train_args[@]}" --ngpu "${ngpu}"
        train_args+=(--init_trained "${exp}/warm_start.safetensors")
    fi
    if [ -f "${exp}/model.safetensors" ] && [ "${dry_run}" = false ]; then
        echo "${exp}/model.safetensors: already trained"
    else
        launch=("${python}" -m espnet2.bin.launch --cmd "${train_run[*]}" --log "${exp}/log/train.log" --ngpu "${ngpu}"
            --num_nodes 1 --init_file_prefix "${exp}/.dist_init_" --multiprocessing_distributed true --
            "${python}" -m pam_espnet.bin.pam_train "${train_args[@]}" --resume true)
        background "${exp}/progress.txt" "${exp}/log/train.log" "${launch[@]}"
    fi
    if [ "${select}" = scores ] || [ -f "${exp}/selection.json" ]; then
        background "${exp}/log/select.log" "${exp}/log/select.log" \
            "${decode_run[@]}" --gpu "$((ngpu > 0))" "${exp}/log/select.log" \
            "${python}" -m pam_espnet.bin.pam_select --exp "${exp}" --by "${select}" --data "${dump}/raw/${valid_set}" \
            --config "${decode_config}" --batch_size "${batch_size}" --dtype "${decode_dtype}" --device "${device}"
    fi
    end "the same command with --stage 4"
fi

if wants 4; then
    begin 4 decode "${exp}/model.safetensors, ${dump}/raw/" "${exp}/decode_${decode_tag}*/"
    needs "${exp}/model.safetensors" "--stage 3 --stop_stage 3"
    hearings=(on)
    [ "${audio_off}" = false ] || hearings+=(zero)
    for hearing in "${hearings[@]}"; do
        decode_dir=${exp}/decode_${decode_tag}
        [ "${hearing}" = on ] || decode_dir=${decode_dir}_audio_off
        sources=() targets=() complete=true
        for set_name in "${tests[@]}"; do
            sources+=("${dump}/raw/${set_name}")
            targets+=("${decode_dir}/${set_name}")
        done
        if [ "${all_prompts}" = true ] && [ "${hearing}" = on ]; then
            reworded=(SET/NUMBER)
            if [ "${dry_run}" = false ]; then
                listed=$("${python}" -m pam_espnet.bin.pam_reword --data "${sources[@]}" --out "${dump}/prompts")
                mapfile -t reworded <<<"${listed}"
            fi
            for name in "${reworded[@]}"; do
                sources+=("${dump}/prompts/${name}")
                targets+=("${decode_dir}/${name%/*}/prompts/${name##*/}")
            done
        fi
        for target in "${targets[@]}"; do
            [ -f "${target}/stats.json" ] || complete=false
        done
        args=(--exp "${exp}" --data "${sources[@]}" --out "${targets[@]}" --config "${decode_config}"
            --batch_size "${batch_size}" --audio "${hearing}" --dtype "${decode_dtype}" --device "${device}")
        if [ "${dry_run}" = true ] || [ "${complete}" = false ]; then
            log=${decode_dir}/log/decode
            background "${log}.1.log" "${log}.*.log" \
                "${decode_run[@]}" --max-jobs-run "${decode_nj}" JOB=1:"${decode_nj}" "${log}.JOB.log" \
                "${python}" -m pam_espnet.bin.pam_decode "${args[@]}" --shard "JOB/${decode_nj}" --threads 1
        fi
        module pam_decode "${args[@]}" --shard "1/${decode_nj}" --merge
    done
    end "the same command with --stage 5"
fi

if wants 5; then
    begin 5 score "${exp}/decode_*/, ${dump}/raw/" "${exp}/RESULTS.md, ${exp}/results.json, pictures"
    needs "${exp}/decode_${decode_tag}" "--stage 4 --stop_stage 4"
    decode_dirs=("${exp}/decode_${decode_tag}")
    [ "${audio_off}" = false ] || decode_dirs+=("${exp}/decode_${decode_tag}_audio_off")
    for decode_dir in "${decode_dirs[@]}"; do
        for set_name in "${tests[@]}"; do
            module pam_score --decode_dir "${decode_dir}/${set_name}" --data_dir "${dump}/raw/${set_name}"
            for asked in "${decode_dir}/${set_name}"/prompts/*/stats.json; do
                [ -f "${asked}" ] || continue  # only the first wording was asked
                asked=${asked%/*}
                module pam_score --decode_dir "${asked}" --data_dir "${dump}/prompts/${set_name}/${asked##*/}"
            done
        done
    done
    module pam_report --exp "${exp}"
    end "see ${exp}/RESULTS.md; one file of it: ./run.sh --stage 6 --stop_stage 6"
fi

if wants 6; then
    archive=${exp}/${tag}.zip
    begin 6 pack "${exp}/, its models" "${archive}"
    needs "${exp}/results.json" "--stage 3 --stop_stage 5"
    module pam_pack --exp "${exp}" --decode_name "${decode_tag}" --out "${archive}"
    answer="python -m pam_espnet.bin.pam_inference --model ${archive} clip.wav --prompt \"...\""
    end "${answer}, or ./run.sh --stage 7 --stop_stage 7"
fi

if wants 7; then
    begin 7 demo "${exp}/${tag}.zip" "nothing"
    module pam_demo --model "${exp}/${tag}.zip" --device "${device}"
fi
