"""Fit maps and gates of early exit on development data, and judge whether they are worth it.

Writes <exp>/exit.safetensors (maps, gates, threshold) and <exp>/exit.json (what was judged). Half of --data is fitted
to, the other half judges; with --fit, which gates of some hundred weights need where --data is small, that is fitted to
and all of --data judges. To decode with it: exit: {mode: gate, calibration: <exp>/exit.safetensors} in the decoding
configuration. Where the predicted speed-up is below 1.05 or the search cannot exit (an LLM that only transformers can
run) the advice is to leave early exit off.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pam_espnet.cli import add_compute_options, compute_device, run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp", required=True, type=Path, help="experiment directory")
    parser.add_argument("--data", required=True, help="formatted development data, dump/raw/dev")
    parser.add_argument("--fit", metavar="DATA", help="other formatted data to fit to, such as dump/raw/train")
    parser.add_argument("--fit_utterances", type=int, default=1000, help="about as many of --fit (default: 1000)")
    parser.add_argument("--layers", type=int, nargs="+", help="candidate blocks (default: upper half, every second)")
    parser.add_argument("--precision", type=float, default=0.95, help="of the tokens that exit (default: 0.95)")
    parser.add_argument("--no_maps", action="store_true", help="gates alone; hidden states are read as they are")
    parser.add_argument("--batch_size", type=int, default=8, help="utterances run together (default: 8)")
    add_compute_options(parser, default_dtype="float32", dtypes=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    from dataclasses import asdict

    from pam_espnet.config import check_number
    from pam_espnet.decode.options import AnswerOptions
    from pam_espnet.decode.speech_llm import SpeechLLM
    from pam_espnet.early_exit.fitting import CostModel, calibrate, candidate_blocks, observe
    from pam_espnet.errors import ConfigError
    from pam_espnet.fileio import write_json

    check_number(args.fit_utterances, "--fit_utterances", at_least=1)
    if not 0 < args.precision <= 1:
        raise ConfigError(f"--precision {args.precision}: must be above 0 and at most 1")
    speech = SpeechLLM.load(args.exp, AnswerOptions(), compute_device(args), args.dtype or "float32")
    model = speech.model
    blocks = model.decoder.num_layers
    layers = list(candidate_blocks(args.layers or (), blocks))
    observed = observe(speech, args.data, layers, args.batch_size)
    if args.fit is None:
        fit, rest = observed.halves()
    else:
        fit, rest = observe(speech, args.fit, layers, args.batch_size, args.fit_utterances), observed
    calibration, judgement = calibrate(fit, rest, layers, model.decoder, args.precision, not args.no_maps)
    calibration.save(args.exp / "exit.safetensors", asdict(judgement))
    can_exit = speech.full_depth.can_exit
    verdict = "on" if judgement.worth_it and can_exit else "off"
    write_json(
        args.exp / "exit.json",
        {
            "advice": verdict,
            "can_exit": can_exit,
            "layers": layers,
            "maps": not args.no_maps,
            "precision_wanted": args.precision,
            "judgement": asdict(judgement),
            "cost_model": asdict(CostModel.of(model.decoder)),
            "tokens": {"fitted": len(fit.last), "judged": len(rest.last)},
            "data": str(args.data),
            "fit": args.fit,
        },
    )
    logging.info(f"wrote {args.exp / 'exit.safetensors'}, {args.exp / 'exit.json'}")
    print(
        f"early exit: {verdict}; predicted speed-up of a step {judgement.speedup:.3f}x, {judgement.coverage:.1%} of "
        f"the tokens exit, {judgement.precision:.1%} of them right, {judgement.mean_depth:.1f} of {blocks} blocks on "
        "average"
    )
    if not can_exit:
        print(
            "the search cannot exit, whatever is predicted: that needs a Llama-type LLM and llm_conf.fused_decoding: "
            "true; the calibration is for pam_exit_report without --sweep"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
