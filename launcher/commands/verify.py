"""``longctx verify`` checks that a strategy is exact against the dense reference, on ``sim`` or on Gloo processes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from longctx.attention import get_strategy
from longctx.catalog import LAYOUTS, LINEAR_STRATEGIES, MIXERS, STRATEGIES
from longctx.config.renamed import KEYS, new_name, refuse_old_value
from longctx.errors import ConfigError, UsageError
from longctx.launcher.progress import progress, with_progress
from longctx.launcher.verify import directory as verify_directory
from longctx.launcher.verify import mesh as verify_mesh
from longctx.launcher.verify import parity_table as parity_page
from longctx.launcher.verify.files import dump, require_writable
from longctx.launcher.verify.matrix import matrix, page, table
from longctx.launcher.verify.ranks import check
from longctx.linear import get_linear
from longctx.options import OPTIONS, StrategyOptions
from longctx.rules import as_word, one_of
from longctx.verify import Verdict, VerifyCase, refusal_of, refused
from longctx.verify.case import DTYPES, document_lengths

PASSED, FAILED, REFUSED = 0, 70, 78


# Options of one attention case, with what they are when left out. The parser leaves them at None, so that
# --mesh can refuse those that were given.
CASE = {
    "strategy": "ring", "layout": None, "layout_block": 1, "mixer": None, "world": 4, "backend": "sim", "seq": None,
    "documents": None, "heads": 8, "kv_heads": 2, "head_dim": 32, "window": None, "non_causal": False, "batch": 1,
    "seed": 0, "kernel": "auto", "dump": None, **OPTIONS, "chunk": 64, "mixer_block": None, "mixer_top_k": None,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strategy",
        help=f"one of {', '.join((*STRATEGIES, *LINEAR_STRATEGIES))}; default: ring, or lasp2 with --mixer",
    )
    parser.add_argument("--layout", help=f"one of {', '.join(LAYOUTS)}; default: what the strategy prefers")
    parser.add_argument("--layout-block", type=int, help="tokens per stripe of the striped layout; default: 1")
    parser.add_argument("--mixer", help=f"of a linear strategy, one of {', '.join(MIXERS)}; default there: basic")
    parser.add_argument("--chunk", type=int, help="tokens that a linear layer computes at once; default: 64")
    parser.add_argument("--mixer-block", type=int, help="tokens of a block of moba, of a chunk of rat")
    parser.add_argument("--mixer-top-k", type=int, help="blocks that a query of moba reads, its own among them")
    parser.add_argument("--world", type=int, help="ranks that share the sequence; default: 4")
    parser.add_argument("--backend", choices=("sim", "gloo"), help="default: sim")
    parser.add_argument("--seq", type=int, help="tokens; default: the sum of --documents, or 1024")
    parser.add_argument("--documents", help="lengths of packed documents, comma-separated; they add up to --seq")
    parser.add_argument("--heads", type=int, help="default: 8")
    parser.add_argument("--kv-heads", type=int, help="default: 2; of linear strategies: as many as --heads")
    parser.add_argument("--head-dim", type=int, help="default: 32")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float64; with --mesh: train.dtype")
    parser.add_argument("--window", type=int, help="a query sees itself and the window - 1 tokens before it")
    parser.add_argument("--non-causal", action="store_true", default=None, help="queries see later tokens too")
    parser.add_argument("--batch", type=int, help="default: 1")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--kernel", help="local kernel by name; default: auto")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (a list with --all)")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the full tensors as safetensors")
    parser.add_argument("--all", action="store_true", help="the whole matrix, of cases or of meshes")
    parser.add_argument("--table", type=Path, metavar="FILE", help="with --all: write the table as Markdown")
    parser.add_argument(
        "--hf", metavar="DIR", help="compare the model of a Hugging Face directory on the mesh with transformers' own"
    )
    verify_mesh.add_arguments(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each field of ``StrategyOptions``; flags of earlier versions are refused with the new one."""
    for one in fields(StrategyOptions):
        words = one.metadata["words"]
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=str if words else int,
            help=f"attention.{one.name}: {', '.join(words) or 'a number'}; default: {as_word(one.default)}",
        )
    for old, new in KEYS.items():
        section, _, name = old.partition(".")
        if section == "attention" and any(key.partition(".")[2] in OPTIONS for key in new):
            parser.add_argument(f"--{name}", action=_Renamed, help=argparse.SUPPRESS)


class _Renamed(argparse.Action):
    """Refuses a flag that has another name now."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        raise UsageError(new_flag(f"attention.{self.dest}"))


def new_flag(key: str) -> str:
    """Says what a flag that stood for ``key`` is called now."""
    words = new_name(key)
    for name in (*KEYS[key], key):
        words = words.replace(name, f"--{name.partition('.')[2].replace('_', '-')}")
    return words


def run(arguments: argparse.Namespace) -> int:
    _check_files(arguments)
    if arguments.hf is not None:
        if arguments.mesh or arguments.all or arguments.steps is not None:
            raise UsageError("--hf compares one directory on one mesh; leave out --mesh, --all and --steps")
        _refuse_case_options(arguments, "--hf", ("seq", "documents", "batch", "seed", "dump"))
        return verify_directory.run(arguments)
    if arguments.mesh:
        _refuse_case_options(arguments, "--mesh")
        return parity_page.run(arguments) if arguments.all else verify_mesh.run(arguments)
    if arguments.steps is not None or arguments.overrides:
        word = f"--steps {arguments.steps}" if arguments.steps is not None else arguments.overrides[0]
        raise UsageError(f"{word} is for a whole run; add --mesh, or leave it out")
    if arguments.all:
        _refuse_of_one_case(arguments)
    defaults = {**CASE, "dtype": "float64"}
    if arguments.mixer is not None or arguments.strategy in LINEAR_STRATEGIES:
        heads = CASE["heads"] if arguments.heads is None else arguments.heads
        defaults |= {"strategy": "lasp2", "mixer": "basic", "kv_heads": heads}
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    if arguments.all:
        return _run_all(arguments)
    case = case_of(arguments)
    reason = refusal_of(case)
    if reason:
        if not arguments.json:
            key = "attention.strategy" if case.mixer is None else "attention.linear"
            raise ConfigError(f"{key}={case.strategy} refuses: {reason}")
        _show([refused(case, reason)], True, many=False)
        return REFUSED
    with progress("longctx verify") as report:
        report(0, 0, _name(case))
        verdict, tensors = check(case)
    if arguments.dump:
        dump(tensors, arguments.dump)
    _show([verdict], arguments.json, many=False)
    return PASSED if verdict.passed else FAILED


def _refuse_of_one_case(arguments: argparse.Namespace) -> None:
    """Refuses flags of one case: the matrix chooses its own cases, but for their length, dtype and backend."""
    given = [name for name in CASE if name not in ("seq", "backend") and getattr(arguments, name) is not None]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for one case, and --all has its own; leave out one of them"
        )


def _refuse_case_options(arguments: argparse.Namespace, flag: str, taken: tuple[str, ...] = ()) -> None:
    given = [name for name in CASE if name not in taken and getattr(arguments, name) is not None]
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for one attention case; {flag} reads the run's configuration, "
            "for example attention=ring attention.layout=zigzag parallel.sp=2"
        )


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuses files that could not be written, before any work."""
    if arguments.table and not arguments.all:
        raise UsageError("--table is for the whole matrix; add --all")
    if arguments.dump and arguments.all and not arguments.mesh:
        raise UsageError("--dump is for one case; leave out --all")
    require_writable(arguments.dump, arguments.table)


def case_of(arguments: argparse.Namespace) -> VerifyCase:
    """Returns the case that the command line describes; refuses what is unknown or not built."""
    linear = arguments.strategy in LINEAR_STRATEGIES
    one_of("--strategy", arguments.strategy, (*STRATEGIES, *LINEAR_STRATEGIES))
    for name in OPTIONS:
        refuse_old_value(f"attention.{name}", getattr(arguments, name))
    if arguments.mixer is not None:
        one_of("--mixer", arguments.mixer, tuple(MIXERS))
        if not linear:
            raise ConfigError(
                f"--mixer {arguments.mixer} is for linear strategies, not for {arguments.strategy}; "
                f"valid strategies: {', '.join(LINEAR_STRATEGIES)}"
            )
    for name in ("chunk", "mixer_block", "mixer_top_k"):
        value = getattr(arguments, name)
        if arguments.mixer is None and value != CASE[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} is for linear strategies, and {arguments.strategy} does not read "
                "it; leave it out"
            )
    documents = document_lengths(arguments.documents)
    return VerifyCase(
        strategy=arguments.strategy,
        layout=arguments.layout or (get_linear if linear else get_strategy)(arguments.strategy).layout,
        world=arguments.world,
        backend=arguments.backend,
        seq=arguments.seq if arguments.seq is not None else sum(documents) or 1024,
        documents=documents,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype,
        window=arguments.window,
        causal=not arguments.non_causal,
        batch=arguments.batch,
        seed=arguments.seed,
        layout_block=arguments.layout_block,
        kernel=arguments.kernel,
        options=StrategyOptions(**{name: getattr(arguments, name) for name in OPTIONS}),
        mixer=arguments.mixer,
        chunk=arguments.chunk,
        mixer_block=arguments.mixer_block,
        mixer_top_k=arguments.mixer_top_k,
    )


def _run_all(arguments: argparse.Namespace) -> int:
    verdicts = []
    seq = 192 if arguments.seq is None else arguments.seq
    cases = list(matrix(seq, arguments.dtype, arguments.backend))
    with progress("longctx verify --all") as report:
        for case in with_progress(cases, report, _name):
            reason = refusal_of(case)
            verdict = refused(case, reason) if reason else check(case)[0]
            verdicts.append((case, verdict))
    if arguments.json:
        _show([verdict for _, verdict in verdicts], True, many=True)
    else:
        print(table(verdicts))
    if arguments.table:
        command = f"longctx verify --all --seq {seq} --dtype {arguments.dtype} --backend {arguments.backend}"
        arguments.table.write_text(page(command, verdicts), encoding="utf-8")
    return PASSED if all(verdict.passed or verdict.refused for _, verdict in verdicts) else FAILED


def _name(case: VerifyCase) -> str:
    return f"{' '.join(filter(None, (case.strategy, case.mixer)))} on {case.layout}, {case.world} ranks"


def _show(verdicts: list[Verdict], as_json: bool, many: bool) -> None:
    if as_json:
        objects = [asdict(verdict) for verdict in verdicts]
        print(json.dumps(objects if many else objects[0]))
        return
    for verdict in verdicts:
        name = " ".join(filter(None, (verdict.strategy, verdict.mixer)))
        print(f"{name} on {verdict.layout}, {verdict.world} ranks, {verdict.backend}, {verdict.dtype}")
        if verdict.refused:
            continue
        for name, error in verdict.errors.items():
            print(f"  {name:4} relative error {error:.2e}")
        print(f"  bytes sent by rank, forward:  {verdict.bytes_forward}")
        print(f"  bytes sent by rank, backward: {verdict.bytes_backward}")
        print(f"  peak extra memory {verdict.peak_extra_bytes} bytes")
        print("  passed" if verdict.passed else "  FAILED")
