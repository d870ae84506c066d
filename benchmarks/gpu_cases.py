"""The GPU kernels at the sizes of training, for gpu_notes.py.

Declared: shapes, how often a kernel touches each tensor, its grid, what it costs an element (counted in its source) and
its registers (as compiled for sm_90). gpu_model.py computes the rest.
"""

from math import ceil

from benchmarks import gpu_model as model
from benchmarks.gpu_model import L2_TURN, Case, Launch, Touch

TRITON, CUDA = "kernels/{}.py", "csrc/cuda/{}.cu"
SERIES = 44  # instructions of exp_minus_linear
FP64_EXP = 40  # fp64 instructions of an exp, a log or a log1p
TILE = 2048  # tokens of csrc/cuda/scan.cuh


def of(size: float, *names: str, times: int = 1) -> list[Touch]:
    return [(name, size, times) for name in names]


def logits() -> list[Case]:
    t, v = 8192, 128256
    shape, x, row, blocks = f"{t} x {v} bf16", of(2 * t * v, "logits"), 4 * t, ceil(v / 4096)
    rows = of(row, "logprobs", "entropy", "highest", "log_sum") + of(8 * t, "targets")
    forward = Launch("token_logprobs", t, x + rows, turns=blocks, registers=64, lanes=13 * t * v, exps=t * v)
    back = {"turns": 2, "registers": 64, "lanes": 14 * t * v, "exps": t * v}
    saved = rows + of(row, "grad_logprobs", "grad_entropy") + of(2 * t * v, "grads") + x
    backward = [Launch("token_logprobs_backward", t * blocks, saved, **back)]
    source, name = TRITON.format("token_logprobs"), "token_logprobs_backward"
    d, chunks, c = 4096, 16, 512
    part = of(4 * c * v, "~logits", times=chunks)
    weight = of(2 * v * d, "weight", times=chunks) + of(2 * t * d, "hidden")
    steps = [
        Launch("mm", ceil(c / 128) * ceil(v / 256), weight + part, 0, matrix=2 * t * d * v, repeat=chunks),
        forward._replace(grid=c, touches=part + rows, registers=80, repeat=chunks),
    ]
    wait = (
        "a block reads 4096 columns at a time, waits for them and for their maximum: no load is in flight meanwhile, so"
    )
    wait += f" {forward.resident} blocks a multiprocessor have to cover for each other"
    return [
        Case("token_logprobs", source, shape, [forward], wait),
        Case(name, source, shape, backward, "a read and a write; a block's scalars come before its logits"),
        Case(name + "_", source, shape, backward, "the same bytes as into a fresh buffer: only the memory differs"),
        Case(
            "linear_token_logprobs",
            source,
            f"{t} x {d} x {v} bf16, {chunks} chunks of {c} rows",
            steps,
            "the matrix library makes fp32 logits of a chunk, which L2 cannot hold: a write and a read of memory beside"
            " the product, and the weight once more a chunk; 512 rows leave the last wave of our kernel unfilled",
        ),
    ]


def divergence() -> list[Case]:
    source, cases = TRITON.format("kl_divergence"), []
    for t, v in ((8192, 128256), (8192, 32000)):
        n, blocks = t * v, ceil(v / 2048)
        rows = of(4 * t, "divergence") + of(24 * t, "statistics")
        kl = Launch("kl_divergence", t, of(2 * n, "p", "q") + rows, blocks, registers=48, lanes=25 * n, exps=2 * n)
        twice = of(2 * n, "p", "q", times=2) + rows
        js = Launch("kl_divergence JS", t, twice, 2 * blocks, 8, 64, lanes=50 * n, exps=6 * n, by_row=True)
        text = (
            "two loads, two maxima and 25 instructions an element: closer to the limit of instructions than one row of"
        )
        text += " logits is"
        cases += [Case("kl_divergence", source, f"{t} x {v} bf16, forward KL", [kl], text)]
        again = "a second read of both rows: it hits L2 only where the rows of all resident blocks fit there, and"
        again += f" {model.SMS * js.resident} blocks hold {model.short(model.SMS * js.resident * 4 * v)}B"
        cases += [Case("kl_divergence", source, f"{t} x {v} bf16, JS", [js], again)]
    n, blocks = 8192 * 128256, ceil(128256 / 2048)
    touches = of(2 * n, "p", "q", "grad_p", "grad_q") + of(4 * 8192, "grad") + of(24 * 8192, "statistics")
    back = Launch("kl_divergence_backward", 8192 * blocks, touches, 2, 8, 40, lanes=24 * n, exps=2 * n)
    for suffix, what in (("", "two reads, two writes"), ("_", "the same bytes, no new memory")):
        cases += [Case("kl_divergence_backward" + suffix, source, "8192 x 128256 bf16, both gradients", [back], what)]
    return cases


def tokens() -> list[Case]:
    cases = []
    for n in (16384, 1048576):
        blocks, shape = ceil(n / 1024), f"{n} tokens fp32"
        size, hidden = 4 * n, " that were just made are still in L2: then it stays below the floor" if n > 1e5 else ""
        small = "a launch takes longer than the bytes" if n < 1e5 else "megabytes" + hidden
        kl = of(size, "logprobs", "ref_logprobs", "out")
        k3 = Launch("approx_kl k3", blocks, kl, 1, 4, 34, lanes=(SERIES + 12) * n, exps=n)
        cases += [
            Case("approx_kl", TRITON.format("approx_kl"), shape, [k3], small + "; the series costs 44 instructions")
        ]
        count = Launch("mask.sum", min(528, blocks), of(n, "mask"), 2)
        for op, inputs, sums, registers, lanes in (
            ("ppo_policy_loss", ("logprobs", "old_logprobs", "advantages", "grad"), 6, 56, SERIES + 40),
            ("value_loss", ("values", "old_values", "returns", "grad"), 3, 40, 35),
        ):
            left = of(4 * sums * blocks, "~partials")
            main = Launch(
                op, blocks, of(size, *inputs) + of(n, "mask") + left, 2, 4, registers, lanes=lanes * n, exps=n
            )
            total = Launch("total", 1, left, ceil(blocks / 256), 4, 86, turn=L2_TURN)
            why = "three launches where there is a mask and no denominator (torch counts it), two otherwise; a mask"
            why += " comes before what it masks; loss, statistics and gradient together, so the backward is a product"
            cases += [Case(op, TRITON.format(op), shape + ", mask", [count, main, total], why)]
    return cases


def sequence_losses() -> list[Case]:
    cases, source = [], TRITON.format("ppo_sequence_loss")
    for sequences, length in ((512, 1024), (16, 32768)):
        n, turns = sequences * length, ceil(length / 1024)
        cu, mask, left = of(4 * sequences, "cu_seqlens"), of(n, "mask"), of(64 * sequences, "~rows")
        tokens = of(4 * n, "logprobs", "old_logprobs", "advantages") + mask
        work = {"lanes": (SERIES + 22) * n, "exps": n, "doubles": 256 * sequences * (FP64_EXP + 70)}
        sums = Launch("sums", sequences, tokens + cu + left, 1 + 2 * turns, 8, 64, **work)
        counting = of(8 * sequences, "~counting", times=sequences + 1)
        last = mask + of(4 * n, "grad") + cu + left + counting
        turns += 1 + ceil(sequences / 256)
        back = Launch("gradient", sequences + 1, last, turns, 4, 76, lanes=10 * n, turn=L2_TURN)
        why = "a block a sequence, which adds what the two signs of the advantage need and so reads it once; the second"
        why += " launch counts the sequences in each block (not with a denominator), then writes"
        why += "" if sequences > model.SMS else f"; {sequences} blocks leave most multiprocessors without work"
        cases += [Case("ppo_sequence_loss", source, f"{sequences} x {length} fp32, mask", [sums, back], why)]
    return cases


def layers() -> list[Case]:
    t, d, w, cases = 8192, 4096, 14336, []
    n, stripes, source = t * d, 1024, TRITON.format("rms_norm")
    rows = of(2 * n, "hidden") + of(2 * d, "weight", times=t)
    one = Launch("rms_norm", t, rows + of(2 * n, "out"), 1, 16, 24, lanes=8 * n)
    why = "a block a row, read once and all at once; the weight comes from L2"
    cases += [Case("rms_norm", source, f"{t} x {d} bf16", [one], why)]
    left = of(4 * stripes * d, "~sums")
    rows = of(2 * n, "grad", "hidden", "of_hidden") + of(2 * d, "weight", times=stripes) + left
    back = Launch("rms_norm_backward", stripes, rows, t / stripes, 16, 60, 16384, lanes=12 * n)
    total = Launch("sum", 128, left + of(4 * d, "~of_weight"), 8, turn=L2_TURN)
    cast = Launch("to", 4, of(4 * d, "~of_weight") + of(2 * d, "of_weight"), turn=L2_TURN)
    why = f"a block takes {t // stripes} rows in turn and keeps the weight's gradient in registers; torch adds those of"
    why += " the blocks, found in L2, and narrows the sum"
    cases += [Case("rms_norm_backward", source, f"{t} x {d} bf16", [back, total, cast], why)]
    n, source = t * w, TRITON.format("silu_mul")
    read, grads = of(2 * n, "gate", "up"), of(2 * n, "grad", "of_gate", "of_up")
    one = Launch("silu_mul", ceil(n / 1024), read + of(2 * n, "out"), 1, 4, lanes=16 * n, exps=2 * n)
    back = Launch("silu_mul_backward", ceil(n / 1024), read + grads, 1, 4, lanes=26 * n, exps=2 * n)
    for launch, what in ((one, "two reads, a write"), (back, "three reads, two writes")):
        why = what + "; an exponential and a reciprocal an element share one unit"
        cases += [Case(launch.kernel, source, f"{t} x {w} bf16", [launch], why)]
    heads, k = 32, 128
    n = t * heads * k
    touches = of(2 * n, "states", "out") + of(2 * t * k, "cos", "sin", times=heads)
    one = Launch("rotary", t * heads, touches, 1, 1, 25, lanes=15 * n)
    why = "a warp a token and head, 256 bytes: of so small blocks a multiprocessor holds 32, too few loads in flight"
    return [*cases, Case("rotary", TRITON.format("rotary"), f"{t} x {heads} x {k} bf16", [one], why)]


def scans() -> list[Case]:
    cases = []
    for segments, length in ((512, 1024), (16, 32768)):
        n, shape = segments * length, f"{segments} x {length} fp32"
        turns = 2 * ceil(length / TILE)
        why = "one load and one scan that wait on one another for each 2048 tokens of a segment"
        why += (
            ", half of which stand idle here" if length < TILE else "; 16 blocks leave 116 multiprocessors without work"
        )
        scan = {"turns": turns, "registers": 40, "shared": 20648, "lanes": 60 * n}
        cu = of(4 * segments, "cu_seqlens")
        reads, pair = of(4 * n, "rewards"), of(4 * n, "values", "advantages", "returns")
        one = Launch("discounted_returns", segments, reads + of(4 * n, "returns") + cu, **scan)
        cases += [Case("discounted_returns", CUDA.format("discounted_returns"), shape, [one], why)]
        one = Launch("gae", segments, reads + pair + cu, **scan)
        cases += [Case("gae", CUDA.format("gae"), shape, [one], why)]
        masked = one._replace(touches=[*one.touches, *of(n, "mask", times=2)], by_row=True)
        why += "; the mask is read with the rewards and again with the result"
        cases += [Case("gae", CUDA.format("gae"), shape + ", mask", [masked], why)]
        scan |= {"registers": 78, "shared": 22952}
        touches = of(4 * n, "logprobs", "ref_logprobs", "rewards", "values", "advantages", "returns") + cu
        left = of(72 * segments, "~rows", times=1)
        first = Launch("shape", segments, touches + left, **scan, doubles=18 * n)
        blocks = min(264, ceil(n / 1024))
        second = of(4 * n, "advantages", times=2) + of(72 * segments, "~rows", times=blocks)
        merging = blocks * (25 * 18 + segments * 18)
        whitens = Launch("whiten_and_report", blocks, second, 3 + n / blocks / 1024, 8, 68, doubles=3 * n + merging)
        why = (
            "fp64 sums beside the scan; the second launch finds the advantages in L2, and each of its blocks merges the"
        )
        why += f" {segments} rows that the first left"
        cases += [Case("ppo_advantages", CUDA.format("ppo_advantages"), shape, [first, whitens], why)]
    return cases


def statistics() -> list[Case]:
    cases, source, n = [], CUDA.format("masked_whiten"), 16384
    touches = of(4 * n, "x", times=2) + of(n, "mask", times=2) + of(4 * n, "y")
    one = Launch("whiten_alone", 1, touches, n / 1024, 32, 54, doubles=10 * n)
    why = "one block, so that the statistics need no second launch: each thread waits for the mask and x, 4 of each at"
    why += " a time, and once more when it whitens"
    cases += [Case("masked_whiten", source, f"{n} fp32, mask", [one], why)]
    for n in (65536, 16777216):
        parts, blocks = min(512, ceil(n / 4096)), min(1024, ceil(n / 4096))
        x, shape = of(4 * n, "x") + of(n, "mask"), f"{n} fp32, mask"
        gather = Launch("gather", parts, x + of(24 * parts, "~parts"), 2 * n / parts / 1024, 8, 44, doubles=6 * n)
        merge = Launch("merge", 1, of(24 * parts, "~parts"), 3, 8, 46, doubles=8 * parts)
        rest = of(4 * n, "y") + of(24 * parts, "~parts", times=blocks)
        whiten = Launch(
            "whiten", blocks, x + rest, 2 + 2 * n / blocks / 1024, 8, 46, doubles=4 * n + 8 * parts * blocks
        )
        why = "fp64 for each element; the mask comes before x, and four loads of each are taken to be in flight at once"
        cases += [Case("masked_moments", source, shape, [gather, merge], why)]
        fits = "finds them in L2" if 4 * n < model.L2_BYTES else "finds them gone from L2, being more than it holds"
        why = (
            f"x and its mask twice, as the statistics come first: the second launch {fits}; each block merges all parts"
        )
        cases += [Case("masked_whiten", source, shape, [gather, whiten], why)]
    n, groups = 4096, 512
    touches = of(4 * n, "scores", times=3) + of(4 * n, "advantages") + of(4 * groups, "cu_groups")
    one = Launch("group_advantages", groups // 4, touches, 4, 4, 40, doubles=40 * n + 200 * groups)
    why = "a warp a group, of which 8 lanes have a score; three dependent passes of some microseconds in all"
    cases += [Case("group_advantages", CUDA.format("group_advantages"), "512 x 8 fp32", [one], why)]
    n, rows = 64, 65536
    scores = of(4 * n, "chosen", "rejected") + of(8 * n, "chosen_rows", "rejected_rows")
    grads = of(4 * rows, "grad_chosen", "grad_rejected")
    zero = Launch("fill", 64, grads, 1, 8, repeat=2)
    one = Launch("pairwise_reward_loss", 1, scores + of(4 * n, "grad_chosen", "grad_rejected"), 4, 16, 68, doubles=4e4)
    why = "one block: what it waits for, index then score, and its sums in fp64, is all of its time; two fills come"
    why += " before, for the gradient of the scores of all tokens"
    shape = f"{n} pairs in {rows} tokens, gathered"
    cases += [Case("pairwise_reward_loss", CUDA.format("pairwise_reward_loss"), shape, [zero, one], why)]
    groups, k = 64, 8
    n = groups * k
    touches = of(4 * n, "scores", "grad", times=1) + of(16 * n, "~scratch", times=2) + of(4 * groups, "cu_groups")
    turns, work = 3 * groups / 16, groups * 32 * 2 * k * FP64_EXP
    one = Launch("ranking_loss", 1, touches, turns, 16, 78, doubles=work)
    why = "one block of 16 warps takes 64 groups in 4 rounds, 8 of 32 lanes at work, each with 16 exponentials in fp64"
    return [*cases, Case("ranking_loss", CUDA.format("ranking_loss"), f"{groups} x {k}, Plackett-Luce", [one], why)]


def generation() -> list[Case]:
    n, v, cases = 64, 128256, []
    for filters, passes in (("none", 4), ("top_p", 4 + 17), ("top_k and top_p", 4 + 16 + 17)):
        touches = of(2 * n * v, "logits", times=passes) + of(8 * n, "seeds", "positions", "tokens", "logprobs")
        turn, work = {"turns": passes * ceil(v / 4096), "turn": L2_TURN}, {"lanes": 10 * n * v * passes}
        one = Launch("sample_tokens", n, touches, **turn, warps=16, registers=63, **work, exps=n * v * passes)
        why = (
            f"{passes} passes over a row by one block, from L2 after the first, and no load in flight while it adds; a"
        )
        why += " bit of the threshold a pass, so 16 for bf16 (32 for fp32); half of the multiprocessors have no row"
        cases += [
            Case("sample_tokens", TRITON.format("sample_tokens"), f"{n} x {v} bf16, filters: {filters}", [one], why)
        ]
    h, kv, k, most = 32, 8, 128, 4096
    for n, length in ((64, 2048), (4, 4096)):
        splits, keys = most // 256, n * kv * length
        partial = of(4 * n * h * splits * (k + 2), "~partial")
        touches = of(2 * keys * k, "keys", "values") + of(2 * n * h * k, "query") + partial
        attend = {"turns": 4 * length / most, "warps": 4, "registers": 112, "shared": 38912}
        work = {"lanes": 6 * 16 * keys, "exps": 16 * keys, "matrix": 4 * 16 * keys * k}
        main = Launch("decode_attention", n * kv * splits, touches, **attend, **work)
        join = Launch("join", n * h, partial + of(2 * n * h * k, "out"), 2, 4, 40, turn=L2_TURN)
        why = "4 query heads fill a quarter of the 16 rows that a tensor core takes; each program reads 256 keys; what"
        why += f" programs leave in fp32 stays in L2, also where a slot is shorter than {most}"
        shape = f"{n} x {length} of {most} keys, {h} heads, {kv} of keys, {k} wide, bf16"
        cases += [Case("decode_attention", TRITON.format("decode_attention"), shape, [main, join], why)]
    return cases


CASES = [*logits(), *divergence(), *tokens(), *sequence_losses(), *layers(), *scans(), *statistics(), *generation()]
