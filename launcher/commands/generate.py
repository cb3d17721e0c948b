"""``longctx generate`` continues a prompt with a run's or a Hugging Face directory's model, on any mesh."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from longctx.config import Config
from longctx.data.files import open_regular
from longctx.data.tokenizer import Tokenizer
from longctx.errors import ConfigError, DataError, UsageError
from longctx.evaluate import Sampling
from longctx.launcher import env
from longctx.launcher.decoding.model import ServedModel, from_directory, from_run, settled
from longctx.launcher.decoding.ranks import GenerationJob, run_job
from longctx.launcher.decoding.text import TextStream, encode, text_of, tokenizer_in
from longctx.launcher.progress import progress
from longctx.rope import TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``longctx generate``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", metavar="RUN", help="a run's directory, or one of its checkpoints")
    model.add_argument("--hf", metavar="DIR", help="a directory as Hugging Face has them")
    parser.add_argument("--step", type=int, metavar="N", help="of --run; default: the newest intact checkpoint")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to go on from")
    prompt.add_argument("--prompt-file", metavar="FILE", help="one prompt, the whole file, in UTF-8")
    prompt.add_argument("--prompt-ids", metavar="IDS", help="token ids, comma-separated")
    parser.add_argument("--max-tokens", type=int, required=True, metavar="N", help="most new tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token; default: 0")
    parser.add_argument("--top-p", type=float, default=1.0, help="the fewest tokens of so much probability; default: 1")
    parser.add_argument("--top-k", type=int, metavar="K", help="only among the K likeliest; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn, the same on any mesh; default: 0")
    parser.add_argument(
        "--stop-ids", metavar="IDS", help="tokens that end the text, comma-separated, or none; default: the model's own"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: that of the directory or the run")
    parser.add_argument("--json", action="store_true", help="print one object: prompt_ids, ids, text")


def run(arguments: argparse.Namespace) -> int:
    """Generates, prints as it goes, and returns the exit code."""
    if env.read_rank() is not None and not any("comm=sim" in word for word in arguments.overrides):
        raise UsageError("generate starts its ranks itself; run it without torchrun or srun, for example comm=gloo")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.seed, top_p=arguments.top_p)
    if not arguments.temperature and (arguments.top_p < 1 or arguments.top_k is not None):
        raise UsageError("--top-p and --top-k choose among tokens that are drawn; set --temperature, for example 1")
    if arguments.max_tokens < 0:
        raise UsageError(f"--max-tokens {arguments.max_tokens} must be at least 0")
    served = _served(arguments)
    tokenizer = tokenizer_in(Path(arguments.tokenizer)) if arguments.tokenizer else served.tokenizer
    prompt = _prompt(arguments, tokenizer)
    stops = served.stop_ids if arguments.stop_ids is None else _ids("--stop-ids", arguments.stop_ids)
    vocab_size = served.config.model.vocab_size
    for name, ids in (("the prompt", prompt), ("--stop-ids", stops if arguments.stop_ids is not None else ())):
        for one in ids:
            if not 0 <= one < vocab_size:
                raise ConfigError(f"{name} has id {one}; the model's vocabulary has 0 to {vocab_size - 1}")
    config = settled(served, len(prompt) + arguments.max_tokens)
    _tell_of_length(config, len(prompt) + arguments.max_tokens)
    checkpoint = None if served.checkpoint is None else str(served.checkpoint)
    job = GenerationJob(config, checkpoint, list(prompt), arguments.max_tokens, replace(sampling, stop_ids=stops))
    found = _shown(job, None if arguments.json else TextStream(tokenizer, _write))
    if arguments.json:
        text = None if tokenizer is None else text_of(tokenizer, found)
        print(json.dumps({"prompt_ids": list(prompt), "ids": found, "text": text}))
    return 0


def _served(arguments: argparse.Namespace) -> ServedModel:
    if arguments.hf is not None:
        if arguments.step is not None:
            raise UsageError(f"--step {arguments.step} is of a run; leave it out with --hf")
        return from_directory(Path(arguments.hf), arguments.overrides)
    return from_run(Path(arguments.run), arguments.step, arguments.overrides)


def _shown(job: GenerationJob, stream: TextStream | None) -> list[int]:
    """Runs the job; how far the prompt is shows until the first token comes, and all of it where nothing streams."""
    with ExitStack() as showing:
        report = showing.enter_context(progress("longctx generate"))
        report(0, 0, f"reading the model and a prompt of {len(job.prompt)} tokens")
        count = 0

        def tell(token: int) -> None:
            nonlocal count
            count += 1
            if stream is None:
                report(count, job.max_tokens, "new tokens")
                return
            showing.close()
            stream.add(token)

        found = run_job(job, tell)
    if stream is not None:
        stream.end()
    return found


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _prompt(arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if arguments.prompt_ids is not None:
        ids = _ids("--prompt-ids", arguments.prompt_ids)
    else:
        if tokenizer is None:
            raise UsageError("there is no tokenizer here that makes ids of text; give --tokenizer DIR, or --prompt-ids")
        text = arguments.prompt if arguments.prompt is not None else _read(Path(arguments.prompt_file))
        ids = tuple(encode(tokenizer, text))
    if not ids:
        raise ConfigError("a prompt of 0 tokens has no next token; give at least 1, such as a begin-of-text token")
    return ids


def _read(file: Path) -> str:
    with open_regular(file) as opened:
        content: bytes = opened.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: bad UTF-8 at byte {error.start}; a prompt is text: save it as UTF-8") from None


def _ids(flag: str, text: str) -> tuple[int, ...]:
    if flag == "--stop-ids" and text == "none":
        return ()
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} {text} must be token ids, comma-separated, such as 1,2,3") from None


def _tell_of_length(config: Config, tokens: int) -> None:
    """Says which length tables of positions are made for, where they depend on one."""
    model = config.model
    for section in dict.fromkeys(model.rope_of(kind) for kind in model.pattern if kind != "L"):
        if TYPES[section.type].by_length:
            print(
                f"note: rope_type={section.type} is computed for {section.length} tokens, whatever the length at hand "
                f"(here {tokens} at most); data.seq_len=N declares another",
                file=sys.stderr,
            )
