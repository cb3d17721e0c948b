"""``longctx verify`` as the contract states it: fields, exit codes, the dump, the matrix, and what it catches."""

import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longctx import catalog
from longctx.catalog import LINEAR_STRATEGIES, MIXERS
from longctx.kernels.dense import Dense
from longctx.launcher import cli
from longctx.launcher.commands import verify as verify_command
from longctx.launcher.verify import ranks as verify_ranks
from longctx.launcher.verify.matrix import matrix, table
from longctx.linear import HeadDims, LinearAttention, get_mixer
from longctx.verify import Verdict, VerifyCase, judge, refused
from longctx.verify.case import TOLERANCE
from tests.equivalence.attention_definition import attention
from tests.verify.cases_in_turn import on_gloo_in_turn

ROOT = Path(__file__).parents[2]
FIELDS = [
    "strategy", "layout", "mixer", "world", "backend", "dtype", "refused", "errors", "bytes_forward",
    "bytes_backward", "peak_extra_bytes", "passed",
]  # fmt: skip
SMALL = ["--seq", "31", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"]


def without_progress(err: str) -> str:
    """What a command said besides the lines that tell, every few seconds, how far it is."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith("longctx verify"))


def verify(capsys, *words: str):
    status = cli.main(["verify", *words])
    captured = capsys.readouterr()
    return status, captured.out, without_progress(captured.err)


def verify_json(capsys, *words: str):
    status, out, err = verify(capsys, *words, "--json")
    assert err == ""
    return status, json.loads(out)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "words",
    [
        ["--layout", "contiguous", "--world", "2", "--documents", "3,27,1"],
        ["--layout", "zigzag", "--world", "3", "--window", "5", "--non-causal", "--batch", "2"],
        ["--strategy", "striped", "--world", "4", "--layout-block", "3", "--window", "1"],
        ["--strategy", "local", "--world", "1", "--kernel", "dense"],
        ["--world", "8", "--documents", ",".join(["1"] * 31)],
    ],
)
def test_an_exact_case_passes_with_every_field(capsys, dtype, words):
    status, verdict = verify_json(capsys, *SMALL, "--dtype", dtype, *words)
    assert status == 0 and verdict["passed"] is True
    assert list(verdict) == FIELDS
    world = verdict["world"]
    assert (verdict["mixer"], verdict["refused"], verdict["backend"], verdict["dtype"]) == (None, None, "sim", dtype)
    assert list(verdict["errors"]) == ["out", "dq", "dk", "dv"]
    assert all(0 <= error < TOLERANCE[dtype][1] for error in verdict["errors"].values())
    assert len(verdict["bytes_forward"]) == len(verdict["bytes_backward"]) == world
    assert verdict["peak_extra_bytes"] > 0


def test_defaults_are_sensible(capsys):
    status, verdict = verify_json(capsys, "--seq", "64", "--head-dim", "8")
    assert (status, verdict["strategy"], verdict["layout"], verdict["world"]) == (0, "ring", "zigzag", 4)
    assert verdict["dtype"] == "float64"
    status, verdict = verify_json(capsys, "--strategy", "striped", "--documents", "10,6", "--head-dim", "8")
    assert (status, verdict["layout"]) == (0, "striped")


def test_the_text_names_every_figure(capsys):
    status, out, err = verify(capsys, *SMALL, "--world", "2")
    assert (status, err) == (0, "")
    for word in ("ring on zigzag, 2 ranks, sim, float64", "out ", "dq ", "dk ", "dv ", "forward:", "backward:", "peak"):
        assert word in out
    assert out.endswith("passed\n")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--strategy", "local", "--world", "4"], "4 ranks share the sequence"),
        (["--strategy", "striped", "--layout", "zigzag"], "use attention.layout=striped, or ring"),
        (["--heads", "8", "--kv-heads", "3"], "nearest valid: kv_heads=2"),
        (["--layout", "spiral"], "valid layouts: contiguous, zigzag, striped"),
        (["--mixer", "gla", "--non-causal"], "nearest valid: mixer=basic"),
        (["--strategy", "lasp", "--non-causal"], "attention.linear=lasp2 has a non-causal form"),
        (["--mixer", "gla", "--layout", "striped"], "nearest valid: attention.layout_block=64"),
        (["--mixer", "gla", "--window", "5"], "--window 5: linear layers have no such choice"),
        (["--mixer", "gla", "--kv-heads", "2"], "nearest valid: --kv-heads 8 for --heads 8"),
    ],
)
def test_what_is_not_exact_is_refused_with_78(capsys, words, reason):
    status, verdict = verify_json(capsys, *words)
    assert status == 78 and reason in verdict["refused"] and verdict["passed"] is False
    assert list(verdict) == FIELDS
    assert (verdict["errors"], verdict["bytes_forward"], verdict["bytes_backward"]) == ({}, [], [])
    status, _, err = verify(capsys, *words)
    assert status == 78 and reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--seq", "1024", "--documents", "300,700"],
            78,
            "add up to 1000; they must add up to --seq 1024",
        ),
        (["--documents", "5,0,3"], 78, "each length must be at least 1"),
        (["--seed", "99999999999999999999"], 78, "must be at least 0 and below 2^63"),
        (["--dump", "/dev/null"], 74, "must be a regular file"),
        (["--travel", "narrow"], 2, "--travel is now --grad-dtype; wide is now fp32; narrow is now compute"),
        (["--backward", "keys"], 2, "--backward is now --backward-rotates; keys is now kv; queries is now q"),
        (["--inner", "2"], 2, "--inner is now --ulysses-degree or --inner-ring"),
        (["--grad-dtype", "narrow"], 78, "attention.grad_dtype: narrow is now compute"),
        (["--documents", "5,-2"], 78, "each length must be at least 1"),
        (["--documents", "5;3"], 78, "'5;3' must be whole numbers with commas between"),
        (["--window", "0"], 78, "attention window 0 must be at least 1"),
        (["--world", "0"], 78, "--world 0 must be at least 1"),
        (["--seq", "0"], 78, "--seq 0 must be at least 1"),
        (["--all", "--seq", "0"], 78, "--seq 0 must be at least 1"),
        (["--layout", "zigzag", "--layout-block", "4"], 78, "layout_block 4 applies to the striped layout"),
        (["--layout", "explicit"], 78, "attention.layout=explicit is not known; valid: contiguous, zigzag, striped"),
        (
            ["--kernel", "flsh"],
            78,
            "=flsh is not known; valid: auto, flash_cuda, flash_cpu, dense",
        ),
        (["--kernel", "flash_cuda"], 78, "device cpu: it runs on cuda; use attention.kernel=auto"),
        (["--strategy", "rign"], 78, "did you mean ring?"),
        (["--mixer", "retnett"], 78, "did you mean retnet?"),
        (["--mixer", "retnet", "--strategy", "ring"], 78, "is for linear strategies, not for ring; valid strategies"),
        (["--chunk", "32"], 78, "--chunk 32 is for linear strategies, and ring does not read it"),
        (["--mixer-block", "8"], 78, "--mixer-block 8 is for linear strategies"),
        (["--mixer", "rat", "--mixer-top-k", "2"], 78, "model.mixer_top_k=2 is not read by mixer=rat"),
        (["--mixer", "moba", "--strategy", "lasp"], 78, "fetches tokens and has no states"),
        (["--mixer", "moba", "--chunk", "8"], 78, "computes by blocks of its own; nearest valid: attention.chunk=64"),
        (["--mixer", "moba", "--non-causal"], 78, "model.mixer=moba is causal by its definition"),
        (["--mixer", "lightning", "--non-causal"], 78, "that of mixer=lightning decays"),
        (["--mixer", "gla", "--chunk", "0"], 78, "--chunk 0 must be at least 1"),
        (["--dump", "nowhere/at/all.safetensors"], 74, "must be a file in a folder that exists"),
        (["--all", "--table", "."], 74, "must be a file in a folder that exists"),
        (["--table", "t.md"], 2, "--table is for the whole matrix; add --all"),
        (["--all", "--dump", "t.safetensors"], 2, "--dump is for one case; leave out --all"),
        (["--all", "--seq", "5", "--window", "3"], 2, "--window is for one case, and --all has its own"),
        (["--all", "--non-causal"], 2, "--non-causal is for one case"),
        (["--documents", ""], 78, "--documents '' must be whole numbers"),
    ],
)
def test_bad_input_is_one_message_and_the_contract_s_code(capsys, words, status, message):
    code, out, err = verify(capsys, *words)
    assert (code, out) == (status, "")
    assert message in err and err.startswith("longctx: ") and err.count("\n") == 1


def test_unknown_options_are_usage_errors(capsys):
    assert verify(capsys, "--wrold", "3")[0] == 2
    assert verify(capsys, "--dtype", "float8")[0] == 2


@pytest.mark.parametrize("words", [["--documents", "9,1,21"], ["--window", "6", "--non-causal", "--batch", "2"]])
def test_the_dump_can_be_checked_by_anyone(capsys, tmp_path, words):
    file = tmp_path / "tensors.safetensors"
    status, verdict = verify_json(capsys, *SMALL, "--world", "3", "--dump", str(file), *words)
    assert status == 0
    tensors = load_file(file)
    assert sorted(tensors) == ["dk", "dout", "dq", "dv", "k", "out", "q", "v"]
    batch = 2 if "--batch" in words else 1
    for name, tensor in tensors.items():
        heads = 2 if name in ("k", "v", "dk", "dv") else 4
        assert tensor.shape == (batch, 31, heads, 8) and tensor.dtype == torch.float64
    lengths = (9, 1, 21) if "--documents" in words else (31,)
    window = 6 if "--window" in words else None
    truth = attention(tensors, (lengths,) * batch, causal="--non-causal" not in words, window=window)
    upstream = tensors["dout"].norm()
    for name, right in truth.items():
        error = float((tensors[name] - right).norm() / (right.norm() + 1e-3 * upstream))
        assert error <= 1e-10 and verdict["errors"][name] <= 1e-10


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "words",
    [
        ["--strategy", "lasp2", "--mixer", "retnet", "--layout", "zigzag", "--world", "3", "--documents", "3,27,1"],
        ["--strategy", "lasp", "--mixer", "gla", "--layout", "striped", "--layout-block", "4", "--chunk", "4"],
        ["--strategy", "headwise", "--mixer", "simple_gla", "--world", "8", "--batch", "2"],
        ["--strategy", "lasp2", "--mixer", "gated_deltanet", "--world", "2"],
        ["--strategy", "lasp2", "--non-causal", "--world", "4", "--documents", "9,1,21"],
    ],
)
def test_an_exact_mixer_passes_with_every_field(capsys, dtype, words):
    status, verdict = verify_json(capsys, "--seq", "31", "--heads", "2", "--head-dim", "8", "--dtype", dtype, *words)
    assert status == 0 and verdict["passed"] is True and list(verdict) == FIELDS
    mixer = get_mixer(verdict["mixer"])
    assert verdict["mixer"] == (words[3] if "--mixer" in words else "basic")
    names = [*mixer.tokens(HeadDims(8, 8)), *mixer.parameters(HeadDims(8, 8)), *mixer.constants(2, 0, 2)]
    assert list(verdict["errors"]) == ["out", *(f"d{name}" for name in names)]
    assert all(0 <= error < TOLERANCE[dtype][1] for error in verdict["errors"].values())
    assert sum(verdict["bytes_forward"]) > 0 and sum(verdict["bytes_backward"]) > 0


def test_a_mixer_s_dump_holds_its_gates_and_weights(capsys, tmp_path):
    file = tmp_path / "tensors.safetensors"
    words = ["--mixer", "gated_deltanet", "--seq", "12", "--heads", "2", "--head-dim", "4", "--world", "3"]
    status, _ = verify_json(capsys, *words, "--dump", str(file))
    tensors = load_file(file)
    shapes = {
        "q": (1, 12, 2, 4), "k": (1, 12, 2, 4), "v": (1, 12, 2, 4), "a": (1, 12, 2, 1), "b": (1, 12, 2, 1),
        "A_log": (2,), "dt_bias": (2,), "q_conv": (2, 4, 4), "k_conv": (2, 4, 4), "v_conv": (2, 4, 4),
    }  # fmt: skip
    whole = {"out": (1, 12, 2, 4), "dout": (1, 12, 2, 4), **shapes, **{f"d{name}": shapes[name] for name in shapes}}
    assert status == 0 and {name: tuple(tensor.shape) for name, tensor in tensors.items()} == whole


def test_a_wrong_mixer_is_caught(capsys, monkeypatch):
    right = LinearAttention.attend

    def wrong(self, q, k, v, plan, log_decay=None, beta=None):
        return right(self, q, k, v, plan, 1.001 * log_decay, beta)

    monkeypatch.setattr(LinearAttention, "attend", wrong)
    status, verdict = verify_json(capsys, "--mixer", "gla", "--seq", "31", "--heads", "2", "--head-dim", "4")
    assert status == 70 and verdict["passed"] is False and verdict["refused"] is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("half", ["forward", "backward"])
def test_a_kernel_with_a_wrong_scale_is_caught(capsys, monkeypatch, dtype, half):
    """In every dtype: a kernel must not be excused by its own error on one device."""
    right = getattr(Dense, half)

    def wrong(self, *arguments):
        place = 4 if half == "forward" else 7
        return right(self, *arguments[:place], 1.5 * arguments[place], *arguments[place + 1 :])

    monkeypatch.setattr(Dense, half, wrong)
    status, verdict = verify_json(capsys, *SMALL, "--world", "2", "--kernel", "dense", "--dtype", dtype)
    assert status == 70 and verdict["passed"] is False and verdict["refused"] is None
    assert verdict["errors"]["dq"] > TOLERANCE[dtype][1]


def test_a_wrong_answer_says_so_in_words(capsys, monkeypatch):
    right = Dense.forward
    monkeypatch.setattr(
        Dense, "forward", lambda self, q, k, v, tiles, scale, into: right(self, q, k, v * 2, tiles, scale, into)
    )
    status, out, _ = verify(capsys, *SMALL, "--world", "2", "--kernel", "dense")
    assert status == 70 and out.endswith("FAILED\n")


def test_nan_and_noise_on_padding_rows_never_pass():
    case = VerifyCase("ring", "contiguous", 2, seq=5, heads=2, kv_heads=1, head_dim=4)
    results = verify_ranks.run_on_sim(case)
    assert judge(case, results)[0].passed
    results[0].tensors["dk"][0, 0, 0, 0] = math.nan
    assert not judge(case, results)[0].passed
    results = verify_ranks.run_on_sim(case)
    assert len(case.plan().positions(0)) == 2 < results[0].tensors["dq"].shape[1]
    results[0].tensors["dq"][0, -1] = 1e-30
    assert not judge(case, results)[0].passed


def test_bytes_that_the_ledger_does_not_know_are_an_error(capsys, monkeypatch):
    from longctx.comm import Traffic

    monkeypatch.setattr(Traffic, "add", lambda self, *_: None)
    status, _, err = verify(capsys, *SMALL, "--world", "2")
    assert status == 70 and "counted 0 bytes sent, the ledger of sim carried" in err


@pytest.mark.gloo
def test_gloo_gives_the_numbers_of_sim(capsys):
    words = [*SMALL, "--world", "2", "--documents", "9,1,21", "--dtype", "float32"]
    _, simulated = verify_json(capsys, *words)
    status, real = verify_json(capsys, *words, "--backend", "gloo")
    assert status == 0 and real["backend"] == "gloo" and real["passed"]
    for field in ("errors", "bytes_forward", "bytes_backward"):
        assert real[field] == simulated[field]


@pytest.mark.gloo
def test_gloo_gives_the_numbers_of_sim_for_mixers(capsys, monkeypatch, tmp_path):
    """The command asks for each case; the processes that answer are started once for all of them."""
    words = ["--mixer", "gated_deltanet", "--seq", "31", "--heads", "3", "--head-dim", "4", "--world", "2"]
    commands = [[*words, "--strategy", one, "--documents", "9,1,21", "--layout", "zigzag"] for one in LINEAR_STRATEGIES]
    simulated = [verify_json(capsys, *command)[1] for command in commands]
    asked = []
    monkeypatch.setattr(verify_ranks, "run_on_gloo", lambda case: asked.append(case) or verify_ranks.run_on_sim(case))
    for command in commands:
        verify_json(capsys, *command, "--backend", "gloo")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    answers = dict(zip(asked, on_gloo_in_turn(asked, tmp_path), strict=True))
    monkeypatch.setattr(verify_ranks, "run_on_gloo", answers.pop)
    for command, expected in zip(commands, simulated, strict=True):
        status, real = verify_json(capsys, *command, "--backend", "gloo")
        assert status == 0 and real["backend"] == "gloo" and real["passed"]
        for field in ("errors", "bytes_forward", "bytes_backward"):
            assert real[field] == expected[field]
    assert len(asked) == len(LINEAR_STRATEGIES) and not answers


@pytest.mark.gloo
def test_a_gloo_rank_that_refuses_is_heard(monkeypatch, capsys):
    words = [*SMALL, "--world", "2", "--backend", "gloo"]
    monkeypatch.setattr(verify_ranks, "asdict", lambda case: {**asdict(case), "kernel": "flash_cuda"})
    status, out, err = verify(capsys, *words)
    assert (status, out) == (78, "")
    assert re.match(r"longctx: .*it runs on cuda", err)


def test_mixers_that_fetch_are_verified_where_queries_choose(capsys):
    sizes = {"moba": ["--mixer-block", "4", "--mixer-top-k", "2"], "rat": ["--mixer-block", "4"]}
    for mixer, words in sizes.items():
        status, _, err = verify(
            capsys,
            "--mixer",
            mixer,
            *words,
            "--seq",
            "41",
            "--layout",
            "striped",
            "--layout-block",
            "3",
            "--heads",
            "2",
        )
        assert (status, err) == (0, "")


def test_the_matrix_passes_on_a_short_sequence(capsys, tmp_path, monkeypatch):
    """Every seventh of its cases, so that all values of all axes occur; the rest is `make matrix`."""
    file = tmp_path / "exactness.md"
    monkeypatch.setattr(verify_command, "matrix", lambda *words: itertools.islice(matrix(*words), 0, None, 16))
    status, out, err = verify(capsys, "--all", "--seq", "5", "--table", str(file))
    assert (status, err) == (0, "")
    assert "WRONG" not in out and out.strip() in file.read_text()
    page = file.read_text()
    assert page.startswith("# Exactness")
    assert "    longctx verify --all --seq 5 --dtype float64 --backend sim\n" in page
    for layout in ("contiguous", "zigzag", "striped"):
        assert f"| ring | {layout} | causal + documents + window 1 |" in page
    assert page.count("| striped | zigzag |") == 1, "what is refused throughout has one line"


def test_the_matrix_as_json_is_a_list_of_the_same_objects(capsys, monkeypatch):
    monkeypatch.setattr(verify_command, "matrix", lambda *words: itertools.islice(matrix(*words), 0, None, 134))
    status, verdicts = verify_json(capsys, "--all", "--seq", "5")
    assert status == 0 and {tuple(verdict) for verdict in verdicts} == {tuple(FIELDS)}
    assert {verdict["refused"] is None for verdict in verdicts} == {True, False}


def test_the_matrix_holds_every_axis():
    cases = list(matrix(40, "float64", "sim"))
    linear = [case for case in cases if case.mixer]
    assert len(linear) == len(set(linear)) == len(LINEAR_STRATEGIES) * len(MIXERS) * 3 * 3 * 5
    assert {case.world for case in linear} == {1, 2, 3, 4, 8}
    assert any(1 in case.documents for case in linear)
    cases = [case for case in cases if not case.mixer]
    assert len(cases) == len(set(cases)) == len(catalog.STRATEGIES) * 3 * 6 * 3 * 5
    assert {case.world for case in cases} == {1, 2, 3, 4, 8}
    assert {(case.heads // case.kv_heads, case.kv_heads) for case in cases} == {(1, 4), (4, 2), (4, 1)}
    assert {bool(case.window) for case in cases} == {case.causal for case in cases} == {True, False}
    assert any(1 in case.documents for case in cases)


def test_the_table_tells_refusals_and_errors_apart():
    def exact(case: VerifyCase, passed: bool = True) -> Verdict:
        errors = {"out": 1e-16, "dq": 3e-15}
        return Verdict(
            case.strategy, case.layout, None, case.world, "sim", "float64", None, errors, [5], [7], 1, passed
        )

    cases = [VerifyCase("ring", "zigzag", world) for world in (1, 2)]
    striped = [VerifyCase("striped", "zigzag", world, window=w) for w in (None, 3) for world in (1, 2)]
    local = [VerifyCase("local", "zigzag", world) for world in (1, 2, 3)]
    rows = [(case, exact(case)) for case in cases]
    rows += [(case, refused(case, "no")) for case in striped]
    rows += [(local[0], exact(local[0])), *((case, refused(case, f"not {case.world}")) for case in local[1:])]
    rows += [(case, exact(case, passed=case.world == 1)) for case in (VerifyCase("ring", "striped", w) for w in (1, 2))]
    assert table(rows).splitlines()[2:] == [
        "| ring | zigzag | causal | 8/2 | 1, 2 | 3.0e-15 | 12, 12 | exact |",
        "| striped | zigzag | all | all | all | | | refused: no |",
        "| local | zigzag | causal | 8/2 | 1 | 3.0e-15 | 12 | exact; refused on 2, 3 |",
        "| ring | striped | causal | 8/2 | 1, 2 | 3.0e-15 | 12, 12 | **WRONG** |",
    ]


def test_a_refusal_by_any_rule_is_an_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--window", "0"], ["--layout", "zigzag", "--layout-block", "3"], ["--kernel", "flsh"]):
        assert cli.main(["verify", "--json", *words]) == 78
        assert json.loads(capsys.readouterr().out)["refused"]
