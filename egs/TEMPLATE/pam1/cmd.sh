# shellcheck shell=bash
# shellcheck disable=SC2034,SC2162  # pam.sh reads these; without -r a blank may be written within a word
# Sourced by recipes: how jobs are started. Each command follows Kaldi's contract: CMD [--gpu n] [JOB=1:n] LOG program...
# --cmd (or $PAM_CMD) names where they run:
#   local   this machine, through utils/run.py
#   slurm   a cluster, through utils/slurm.py; conf/slurm.conf of the recipe, else slurm.conf beside this file, has the
#           sbatch flags. The recipe's folder must be on a file system that the nodes share.
# To use another queue with the same contract, set train_cmd and decode_cmd before calling run.sh: words separated by
# blanks (within a word: "\ ").
case "${cmd:-local}" in
    local) runner=("${PAM_ROOT}/utils/run.py") ;;
    slurm)
        if [ "${dry_run:-false}" = false ] && ! command -v sbatch >/dev/null; then
            echo "error: --cmd slurm: sbatch not found on PATH" >&2
            echo "  -> log in to a node of the cluster; or run on this machine: --cmd local" >&2
            exit 1
        fi
        slurm_conf=${PAM_ROOT}/egs/TEMPLATE/pam1/slurm.conf
        [ ! -f conf/slurm.conf ] || slurm_conf=conf/slurm.conf
        runner=("${PAM_ROOT}/utils/slurm.py" --config "${slurm_conf}")
        ;;
    *)
        echo "error: --cmd must be local or slurm, not '${cmd}'" >&2
        exit 1
        ;;
esac
train_run=("${runner[@]}")
decode_run=("${runner[@]}")
[ -z "${train_cmd:-}" ] || read -a train_run <<<"${train_cmd}"
[ -z "${decode_cmd:-}" ] || read -a decode_run <<<"${decode_cmd}"
