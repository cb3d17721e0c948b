"""Says what names of other trainers mean here, for the messages about a name that is not known.

One line each, by the key that holds such a name. What a line says completes "<key>=<word> is not known: …".
"""

from __future__ import annotations

# Keys that hold names of the catalog, by the group that they are the choice of.
GROUP_OF = {
    "attention.strategy": "attention",
    "comm.backend": "comm",
    "data.source": "data",
    "engine.name": "engine",
    "optim.name": "optim",
}

_KERNEL = "it is a kernel, which attention.kernel=auto takes where it can; attention= says who shares the sequence"
_CONTEXT_PARALLEL = "here attention=ring (or another strategy) with parallel.sp=N"
_ZIGZAG = "here attention=ring attention.layout=zigzag"
_BFLOAT16 = "here train.dtype=bfloat16 (fp32 weights and sums)"

VALUES: dict[str, dict[str, str]] = {
    "attention": {
        **dict.fromkeys(("flash", "flashattention", "flashattn", "flashattention2", "fa", "fa2", "fa3"), _KERNEL),
        **dict.fromkeys(("sdpa", "xformers", "flex", "flexattention", "cudnn", "te"), _KERNEL),
        **dict.fromkeys(("cp", "contextparallel", "contextparallelism", "sp", "sequenceparallel"), _CONTEXT_PARALLEL),
        **dict.fromkeys(("zigzag", "zigzagring", "headtail", "loadbalance"), _ZIGZAG),
        **dict.fromkeys(("ringattention", "ringflash", "ringflashattention", "p2p"), "here attention=ring"),
        **dict.fromkeys(("stripe", "stripedattention", "stripedring"), "here attention=striped"),
        **dict.fromkeys(("deepspeed", "deepspeedulysses", "alltoall", "a2a", "alst"), "here attention=ulysses"),
        **dict.fromkeys(("a2a+p2p", "hybrid", "unified", "loongtrain", "2d"), "here attention=usp"),
        **dict.fromkeys(("allgather", "kvgather", "llama3"), "here attention=gather"),
        **dict.fromkeys(("doublering", "burstattention", "burstengine"), "here attention=burst"),
        **dict.fromkeys(("treeattention", "treedecoding"), "here attention=tree"),
        **dict.fromkeys(
            ("full", "eager", "softmax", "mha", "none", "default"), "without sharing it is attention=local"
        ),
        **dict.fromkeys(("cad", "distca"), "here attention=disaggregated"),
        **dict.fromkeys(("linear", "lasp1"), "linear layers are model.pattern with attention=lasp2"),
    },
    "attention.kernel": {
        **dict.fromkeys(("flash", "flashattn", "flashattention", "fa2", "fa3", "sdpa"), "here flash_cuda or flash_cpu"),
        **dict.fromkeys(("eager", "math", "naive"), "here dense"),
    },
    "attention.layout": dict.fromkeys(("headtail", "loadbalance", "balanced"), "here zigzag"),
    "comm": {
        **dict.fromkeys(("cuda", "gpu", "gpus"), "here comm=nccl"),
        **dict.fromkeys(("cpu", "mpi"), "here comm=gloo"),
        **dict.fromkeys(("fake", "simulated", "simulation", "local"), "here comm=sim"),
    },
    "data": {
        **dict.fromkeys(("txt", "json", "jsonl", "file", "files", "folder"), "here data=text data.path=FILE_OR_FOLDER"),
        **dict.fromkeys(("bin", "memmap", "mmap", "numpy", "tokenized"), "here data=tokens data.path=FILE"),
        **dict.fromkeys(("stdlib", "python", "default"), "here data=python_stdlib"),
    },
    "engine": dict.fromkeys(("fsdp", "fsdp2", "ddp", "torch", "pytorch"), "engine=native is FSDP2, as parallel.* says"),
    "optim": dict.fromkeys(("adam", "fusedadam", "adamwtorch", "adamwtorchfused"), "here optim=adamw"),
    "optim.schedule": {
        **dict.fromkeys(("warmupstabledecay", "trapezoid", "trapezoidal"), "here wsd"),
        **dict.fromkeys(("cosinedecay", "cosineannealing", "cosinewithwarmup", "cosinewithminlr"), "here cosine"),
        **dict.fromkeys(("constantwithwarmup", "none", "flat"), "here constant"),
        "linear": "wsd falls in a straight line, over optim.decay_steps",
    },
    "parallel": dict.fromkeys(("fsdp", "cp", "ring"), "set degrees: parallel.sp=N, parallel.dp_shard=N"),
    "train.dtype": {
        **dict.fromkeys(("bf16", "amp", "autocast", "mixed", "bf16mixed", "half", "fp16", "float16", "16"), _BFLOAT16),
        **dict.fromkeys(("fp32", "float", "32"), "here train.dtype=float32"),
        **dict.fromkeys(("fp64", "double", "64"), "here train.dtype=float64"),
    },
    "train.recompute": {
        **dict.fromkeys(("true", "on", "block"), "here train.recompute=full"),
        **dict.fromkeys(("false", "off"), "here train.recompute=none"),
    },
}

_SEQUENCE = "parallel.sp"
_TENSOR = "parallel.tp"
_PIPELINE = "parallel.pp"
_ALL_BATCHES = "train.global_batch (accumulation is global_batch / (data-parallel groups × micro_batch))"

# The last word of a key, without _ and in lower case -> the key that it is here.
KEYS: dict[str, str] = {
    **dict.fromkeys(("cp", "contextparallel", "contextparallelsize", "contextparalleldegree", "cpsize"), _SEQUENCE),
    **dict.fromkeys(("sequenceparallel", "sequenceparallelsize", "spsize", "ringdegree", "ulyssessize"), _SEQUENCE),
    **dict.fromkeys(("tensorparallel", "tensorparallelsize", "tensormodelparallelsize", "tpsize"), _TENSOR),
    **dict.fromkeys(("pipelineparallel", "pipelineparallelsize", "pipelinemodelparallelsize", "ppsize"), _PIPELINE),
    **dict.fromkeys(("fsdp", "zero", "zerostage", "dataparallelsharddegree"), "parallel.dp_shard"),
    **dict.fromkeys(("ddp", "dataparallelreplicatedegree"), "parallel.dp_replicate"),
    **dict.fromkeys(("dp", "dataparallel", "dataparallelsize"), "parallel.dp_shard or parallel.dp_replicate"),
    **dict.fromkeys(("learningrate", "peaklr", "maxlr"), "optim.lr"),
    **dict.fromkeys(("minlr", "minlrratio", "lrmin", "finallr"), "optim.min_lr_ratio (a share of optim.lr)"),
    **dict.fromkeys(("scheduler", "lrscheduler", "lrschedulertype", "lrdecaystyle"), "optim.schedule"),
    **dict.fromkeys(
        ("warmup", "numwarmupsteps", "lrwarmupsteps", "lrwarmupiters", "warmupratio"), "optim.warmup_steps"
    ),
    **dict.fromkeys(("lrdecayiters", "lrdecaysteps"), "optim.decay_steps"),
    **dict.fromkeys(("wd",), "optim.weight_decay"),
    **dict.fromkeys(("maxgradnorm", "clipgrad", "gradientclipping", "maxnorm"), "optim.grad_clip"),
    **dict.fromkeys(("batchsize", "globalbatchsize", "bsz"), "train.global_batch"),
    **dict.fromkeys(("microbatchsize", "perdevicetrainbatchsize", "localbatchsize"), "train.micro_batch"),
    **dict.fromkeys(("gradientaccumulationsteps", "gradaccum", "accumulategradbatches"), _ALL_BATCHES),
    **dict.fromkeys(("maxsteps", "trainiters", "numsteps", "numtrainsteps", "totalsteps", "iterations"), "train.steps"),
    **dict.fromkeys(("bf16", "fp16", "precision", "mixedprecision", "torchdtype"), "train.dtype"),
    **dict.fromkeys(("activationcheckpointing", "gradientcheckpointing", "ac"), "train.recompute"),
    **dict.fromkeys(
        ("seqlength", "maxseqlen", "maxseqlength", "contextlength", "blocksize", "maxlength"), "data.seq_len"
    ),
    **dict.fromkeys(("dataset", "datasets", "datadir", "datapath", "traindata", "trainfile"), "data=text data.path"),
    **dict.fromkeys(("saveinterval", "savesteps", "saveevery", "checkpointinterval"), "checkpoint.every"),
    **dict.fromkeys(("savetotallimit",), "checkpoint.keep"),
    **dict.fromkeys(("outputdir", "outdir", "logdir", "savedir", "workdir", "dumpfolder"), "run.dir"),
    **dict.fromkeys(("slidingwindow", "windowsize", "swa"), "attention.window"),
    **dict.fromkeys(("hiddensize", "dmodel", "nembd"), "model.dim"),
    **dict.fromkeys(("intermediatesize", "ffnhiddensize"), "model.hidden_dim"),
    **dict.fromkeys(("numlayers", "nlayers", "numhiddenlayers"), "model.layers"),
    **dict.fromkeys(("numheads", "nheads", "numattentionheads"), "model.heads"),
    **dict.fromkeys(("numkeyvalueheads", "nkvheads", "numquerygroups"), "model.kv_heads"),
    **dict.fromkeys(("experiment", "preset"), "recipe"),
    **dict.fromkeys(("gpus", "devices", "gpuspernode", "nprocpernode"), "cluster.devices_per_node"),
}


def plain(word: str) -> str:
    """Returns a word as the tables have it."""
    return word.lower().replace("_", "").replace("-", "").replace(" ", "")


def meaning_of_value(key: str, word: str) -> str | None:
    """Says what a name of another trainer means as a value of ``key``, or None."""
    return VALUES.get(GROUP_OF.get(key, key), {}).get(plain(word))


def meaning_of_key(path: str) -> str | None:
    """Returns what a key of another trainer is called here, or None."""
    return KEYS.get(plain(path.rpartition(".")[2]))
