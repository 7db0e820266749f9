"""The arguments of every subcommand. Nothing heavy is imported here, so `--help` is instant."""

import argparse
import math
import os

from clvp_fast import __version__
from clvp_fast.cli.helping import HELP, Parser
from clvp_fast.engine.defaults import ACTIVATION_DTYPES, DTYPES, MEMORY_FRACTION, SCORING_MODES, TEXT_CLEANINGS
from clvp_fast.engine.sampling_params import NUM_CANDIDATES, PRESETS, RANGES, SamplingParams
from clvp_fast.io.files import user_path


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `clvp-fast`; `command` names the module of `clvp_fast.cli` that runs it."""
    parser = Parser(
        prog="clvp-fast",
        description="CLVP: text and a voice clip to ranked speech candidates.",
        epilog="`clvp-fast COMMAND --help` ends with examples.",
    )
    parser.add_argument("--version", action="version", version=f"clvp-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--debug", action="store_true", help="show where an error came from")
    everywhere.add_argument("--json", action="store_true", help="print the result as JSON; notes stay on stderr")
    for add in (_generate, _speak, _batch, _score, _mel, _convert, _info, _bench):
        add(commands, everywhere)
    for name, (usage, shown, examples) in HELP.items():
        command = commands.choices[name]
        command.usage = f"clvp-fast {name} {usage}"
        command.shorten(shown.split(), examples)
    return parser


def _generate(commands, everywhere) -> None:
    parser = commands.add_parser(
        "generate", parents=[everywhere], help="speech candidates for texts in voices, best first"
    )
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "text", nargs="*", type=_text, default=[], metavar="TEXT", help="the text to speak; several are allowed"
    )
    texts.add_argument(
        "--texts",
        type=_path,
        metavar="FILE",
        help="file with one text per line, without blank lines; - is standard input",
    )
    parser.add_argument(
        "--voice",
        required=True,
        type=_path,
        action="append",
        metavar="VOICE",
        help="a recording (WAV, FLAC, MP3, OGG; its first 6 s count), a folder of recordings of one speaker, which are "
        "averaged, a voice that --save-voice wrote, or Tortoise's latents (.pth); repeat it for more voices",
    )
    _add_crop_seed(parser)
    _add_checkpoint(parser)
    parser.add_argument(
        "--out", type=_path, default="out", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    _add_candidates(parser)
    parser.add_argument(
        "--keep", type=_positive_int, metavar="K", help="write the codes of only the K best (default: all)"
    )
    _add_scoring(parser)
    parser.add_argument(
        "--seed", type=_sampling["seed"], default=0, help="seed of the random draws (default: %(default)s)"
    )
    more = parser.add_argument_group("more results")
    more.add_argument(
        "--listen",
        action="store_true",
        help="write the kept candidates as recordings, and report.html to hear them, if the checkpoint has a vocoder",
    )
    more.add_argument("--latents", action="store_true", help="write the decoder's latents of the kept candidates too")
    more.add_argument(
        "--save-voice", type=_path, metavar="FILE", help="save the voice, for a later --voice without its recordings"
    )
    more.add_argument("--no-pictures", action="store_true", help="write no candidates.png")
    _add_decoding(parser)


def _speak(commands, everywhere) -> None:
    parser = commands.add_parser(
        "speak", parents=[everywhere], help="a text in a voice to a WAV, through Tortoise's vocoder or a checkpoint's"
    )
    parser.add_argument("text", type=_text, metavar="TEXT", help="the text to speak")
    parser.add_argument(
        "--voice",
        required=True,
        type=_path,
        nargs=1,
        metavar="VOICE",
        help="a recording, a folder of recordings of one speaker, or Tortoise's latents (a pair, .pth)",
    )
    model = parser.add_mutually_exclusive_group()
    _add_checkpoint(model)
    model.add_argument(
        "--tortoise",
        type=_path,
        metavar="DIR",
        help="the folder of Tortoise's .pth files: decoder, CLVP, diffusion and vocoder (with tortoise-tts 3.0.0)",
    )
    parser.add_argument(
        "--out", type=_path, default="speech.wav", metavar="FILE", help="the WAV to write (default: %(default)s)"
    )
    _add_candidates(parser)
    _add_scoring(parser)
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of candidates and of the diffusion's noise (default: %(default)s)"
    )
    parser.add_argument(
        "--iterations",
        type=_positive_int,
        metavar="N",
        help="iterations of Tortoise's diffusion (default: the preset's 30, 80, 200 or 400; 80 without)",
    )
    _add_decoding(parser)
    # The arguments that only `generate` has: here there is one text in one voice, and the best candidate is kept.
    parser.set_defaults(texts=None, crop_seed=None, keep=1)


def _batch(commands, everywhere) -> None:
    parser = commands.add_parser(
        "batch",
        parents=[everywhere],
        help="speech candidates for a whole corpus, to Parquet; continues where it was stopped",
    )
    parser.add_argument(
        "input",
        type=_path,
        metavar="INPUT",
        help="JSON lines, CSV or Parquet with columns id, text, voice and, if rows have their "
        "own, num_candidates, max_new_tokens, temperature, seed and so on",
    )
    parser.add_argument(
        "--out", type=_path, required=True, metavar="DIR", help="folder of the job; the same command again continues it"
    )
    parser.add_argument(
        "--voice",
        type=_path,
        metavar="VOICE",
        help="voice of rows that name none: a recording, a folder of recordings of one speaker, or a saved voice",
    )
    _add_crop_seed(parser)
    _add_checkpoint(parser)
    _add_candidates(parser)
    parser.add_argument(
        "--keep", type=_non_negative_int, default=1, metavar="K", help="write the K best of a row; 0: all (default: 1)"
    )
    _add_scoring(parser)
    parser.add_argument(
        "--seed",
        type=_sampling["seed"],
        default=0,
        help="seed of the job; a row's seed follows from it and the row's id (default: %(default)s)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="try rows again that failed before")
    more = parser.add_argument_group("more results")
    more.add_argument("--latents", action="store_true", help="write the decoder's latents of the kept candidates too")
    more.add_argument("--embeddings", action="store_true", help="write the embeddings of text and speech too")
    more.add_argument(
        "--shard-rows",
        type=_positive_int,
        metavar="N",
        help="rows per file of results (default: 1024; 64 with --latents)",
    )
    cluster = parser.add_argument_group("on a cluster (pip install '.[ray]' in a clone)")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const=True,
        metavar="ADDRESS",
        help="a Ray cluster; without ADDRESS the one that Ray finds, or this machine",
    )
    cluster.add_argument(
        "--workers",
        type=_positive_int,
        metavar="N",
        help="the most workers (default: one for each GPU, or without GPUs one for each machine)",
    )
    cluster.add_argument(
        "--threads", type=_positive_int, metavar="N", help="threads of a worker on a CPU (default: all)"
    )
    _add_decoding(parser)


def _score(commands, everywhere) -> None:
    parser = commands.add_parser(
        "score", parents=[everywhere], help="rank given speech codes against a text, or recordings against texts"
    )
    parser.add_argument(
        "codes",
        nargs="?",
        metavar="CODES",
        help="codes.npz of `generate`, an .npy array [candidates, length], or a .json list of lists",
    )
    parser.add_argument("text", nargs="?", type=_text, metavar="TEXT", help="the text that the codes should say")
    parser.add_argument(
        "--model",
        choices=("clvp", "clap"),
        default="clvp",
        help="clvp: speech codes against a text; clap: --audio against --text (default: %(default)s)",
    )
    clap = parser.add_argument_group("with --model clap, in place of CODES and TEXT")
    clap.add_argument(
        "--audio",
        nargs="+",
        type=_path,
        default=[],
        metavar="RECORDING",
        help="WAV, FLAC, MP3 or OGG, or folders of them",
    )
    clap.add_argument(
        "--text",
        nargs="+",
        type=_text,
        default=[],
        dest="texts",
        metavar="TEXT",
        help="each text ranks the recordings separately",
    )
    clap.add_argument("--seed", type=_seed, default=0, help="of the crops of long recordings (default: %(default)s)")
    _add_scoring(parser)
    parser.add_argument(
        "--checkpoint",
        type=_path,
        metavar="NAME",
        help="a folder or a hub id (default: 'demo', small, for about 500 words; ./demo means a folder named demo; "
        "with --model clap laion/clap-htsat-unfused)",
    )
    parser.set_defaults(refuse=parser.error)
    _add_device(parser)
    _add_text_cleaning(parser)


def _mel(commands, everywhere) -> None:
    parser = commands.add_parser(
        "mel", parents=[everywhere], help="log-mel features of recordings or folders of them, with a picture"
    )
    parser.add_argument(
        "recordings",
        nargs="+",
        type=_path,
        metavar="RECORDING",
        help="WAV, FLAC, MP3 or OGG, or a folder: all recordings in it; results keep its sub-folders",
    )
    parser.add_argument(
        "--checkpoint",
        type=_path,
        metavar="NAME",
        help="take rate, bins and mel norms from this checkpoint (default: CLVP's, no norms)",
    )
    parser.add_argument("--whole", action="store_true", help="whole recordings instead of their first 6 s, unpadded")
    parser.add_argument(
        "--out", type=_path, default="out", metavar="DIR", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument(
        "--npz", action="store_true", help="one features.npz with an array for each recording, instead of an .npy each"
    )
    parser.add_argument(
        "--pictures", action="store_true", help="a picture of each recording instead of one overview.png of the first"
    )


def _convert(commands, everywhere) -> None:
    parser = commands.add_parser(
        "convert", parents=[everywhere], help="original Tortoise checkpoints to a checkpoint folder"
    )
    parser.add_argument("--autoregressive", required=True, metavar="FILE", help="autoregressive.pth")
    parser.add_argument("--clvp", required=True, metavar="FILE", help="clvp2.pth")
    parser.add_argument("--out", type=_path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json (default: looked for beside the checkpoints)"
    )
    parser.add_argument(
        "--mel-norms", metavar="FILE", help="mel_norms.pth (default: looked for beside the checkpoints)"
    )


def _info(commands, everywhere) -> None:
    commands.add_parser("info", parents=[everywhere], help="versions, devices, and which operator uses which backend")


def _bench(commands, everywhere) -> None:
    parser = commands.add_parser(
        "bench", parents=[everywhere], help="measure every kernel and the whole beside their rivals (in a clone)"
    )
    add_bench_arguments(parser)


def add_bench_arguments(parser) -> None:
    """Add the arguments of `clvp-fast bench` and of `python -m benchmarks.run`."""
    parser.add_argument("workload", nargs="*", metavar="NAME", help="workload to measure, see --list (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="name workloads and providers, and measure nothing")
    parser.add_argument(
        "--providers",
        metavar="NAMES",
        help="measure only these, such as ours,torch (see --list; default: all); documents leave such rows out",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="measure nothing: the ratios of B's rows to A's; each a commit that has rows, or a file or folder of them",
    )
    parser.add_argument("--resume", action="store_true", help="skip shapes for which the present code has rows")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no shape after S seconds; the rest is listed")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, once: whether it runs. Rows are not kept")
    parser.add_argument("--results", metavar="DIR", help="folder for the rows (default: benchmarks/results)")


def _add_crop_seed(parser) -> None:
    parser.add_argument(
        "--crop-seed",
        type=_non_negative_int,
        metavar="N",
        help="use a random 6 s of each longer recording, as Tortoise does (default: the first 6 s)",
    )


def _add_checkpoint(parser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=_path,
        default="demo",
        metavar="NAME",
        help="'demo' (small, knows about 500 words), 'random' (random weights), a folder (./demo means a folder named "
        "demo), or a hub id (default: %(default)s)",
    )


def _add_candidates(parser) -> None:
    parser.add_argument(
        "--num-candidates",
        type=_sampling["num_candidates"],
        metavar="N",
        help=f"default: {NUM_CANDIDATES}, or 1 with --greedy",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"Tortoise's number of candidates: {', '.join(f'{name} {count}' for name, count in PRESETS.items())}",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=_sampling["max_new_tokens"],
        metavar="N",
        help=f"longest candidate (default: {SamplingParams.max_new_tokens}, or what the checkpoint has positions for)",
    )


def _add_decoding(parser) -> None:
    """Add the options that `generate` and `batch` share."""
    _add_sampling(parser)
    _add_memory(parser)
    _add_device(parser)
    parser.add_argument(
        "--score-dtype",
        choices=DTYPES,
        help="of a copy of the speech encoder for the ranking: bfloat16 ranks faster on new CPUs (default: --dtype)",
    )
    _add_text_cleaning(parser)


def _add_sampling(parser) -> None:
    sampling = parser.add_argument_group("sampling (defaults are Tortoise's)")
    for name, meaning in (
        ("temperature", "default: %(default)s"),
        ("top_p", "default: %(default)s"),
        ("top_k", "0: all tokens (default: %(default)s, as in Tortoise)"),
        ("typical_p", "1: off (default: %(default)s)"),
        ("min_p", "0: off (default: %(default)s)"),
        ("repetition_penalty", "default: %(default)s"),
    ):
        option = f"--{name.replace('_', '-')}"
        sampling.add_argument(option, type=_sampling[name], default=getattr(SamplingParams, name), help=meaning)
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token: one candidate")


def _add_memory(parser) -> None:
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--batch-size",
        type=_positive_int,
        metavar="N",
        help="candidates at a time, of all texts (default: as memory allows, up to 512 on a GPU and 16 on a CPU)",
    )
    memory.add_argument(
        "--memory-fraction",
        type=_fraction,
        default=MEMORY_FRACTION,
        help="share of the free memory to use beside the weights (default: %(default)s)",
    )
    memory.add_argument(
        "--int8-weights",
        action="store_true",
        help="decode over copies of the layers' weights in 8 bits: changes candidates, and is faster on a CPU",
    )
    memory.add_argument(
        "--activation-dtype",
        choices=ACTIVATION_DTYPES,
        help="with --int8-weights, also round what they are multiplied by to 8 bits: changes candidates more, and is "
        "the fastest on a CPU",
    )
    memory.add_argument(
        "--float8-pages",
        action="store_true",
        help="keep keys and values in 8 bits: changes candidates, and fits twice as many at a time on a GPU",
    )
    memory.add_argument(
        "--no-packed-weights",
        dest="packed_weights",
        action="store_false",
        default=None,
        help="decode without packed copies of the weights, which a CPU reads faster, if they fit in memory",
    )


def _add_scoring(parser) -> None:
    parser.add_argument(
        "--scoring",
        choices=SCORING_MODES,
        default=SCORING_MODES[0],
        help="padded: as Tortoise, all candidates at one length; trimmed: each at its own (default: %(default)s)",
    )


def _add_device(parser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default: %(default)s)")


def _add_text_cleaning(parser) -> None:
    parser.add_argument(
        "--text-cleaning",
        choices=TEXT_CLEANINGS,
        default=TEXT_CLEANINGS[0],
        help="how numbers, years and accents are spelt out; checkpoints were trained with tortoise's (default)",
    )


def _text(given: str) -> str:
    """Read a text from the command line. Bytes outside the locale, which Python keeps as surrogates, are UTF-8."""
    try:
        given.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(given).decode()
        except UnicodeError as error:
            raise argparse.ArgumentTypeError(f"{given!r} is not UTF-8 text ({error})") from error
    return given


def _path(given: str) -> str:
    try:
        user_path(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return given


def _number(kind, accept, wanted: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_positive_int = _number(int, lambda value: value >= 1, "a whole number from 1 on")
_seed = _number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
_non_negative_int = _number(int, lambda value: value >= 0, "a whole number from 0 on")
_fraction = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
# by field of `SamplingParams`
_sampling = {
    name: _number(allowed.kind, allowed.holds, f"{'a number ' if allowed.kind is float else ''}{allowed.wanted}")
    for name, allowed in RANGES.items()
}
