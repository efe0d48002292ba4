"""Prep speed against the ways people prepare chat data today, on real text, per core.

    python bench/prep.py [repeats=3] [megabytes=96] [large=800] [work=output/bench] [out=bench/prep.json]

Two corpora: short multi-turn chats (the chitchat-dataset package, fetched from PyPI into `work`) and long answers
(Python sources of the packages installed here, 12,000 characters of them at a time). The tokenizer has 131,072
entries: the tekken vocabulary that mistral-common ships, as a tokenizer.json.

The runners, each in a process of its own on one core, taking turns so that a noisy machine disturbs all alike:

    prep       recipes/prep.py's whole work with workers=1: JSONL -> template -> tokens -> split -> packs -> .npy,
               report and commit; loading the tokenizer included
    prefixes   the straightforward exact path, as Nemotron's own recipe does it: render the conversation up to every
               message with apply_chat_template, encode what that added; no packing, no writing, loading not counted
    template   datasets.map over transformers' apply_chat_template(tokenize=True): no loss mask, no packing
    encode     tokenizers' encode_batch_fast on text that is rendered already: what tokenization alone costs
    floor      what no preparation can do without, on the whole corpus: orjson's parsing of every line, and the fast
               encoder on the same spans, rendered already
    repack     recipes/prep.py again with twice the pack size, from the tokens that it kept; loading included

Rates are tokens per second of CPU time, which other programs on the machine disturb least; the slow runners get the
beginning of the corpus. Two workers on two cores against one on one core is measured by the clock, on `large`
megabytes (0 leaves it out), and needs two idle cores.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = {"prefixes": 1_000_000, "template": 4_000_000, "encode": 8_000_000}  # JSONL that the slow runners get
TARGETS = {
    "short": {"prefixes": 60, "template": 8, "encode": 2},
    "long": {"prefixes": 10, "template": 8, "encode": 4},
}


# --- corpora and tokenizer ---------------------------------------------------------------------------------


def short_chats(work: Path) -> Iterator[dict]:
    """Conversations of two people, one of them as the assistant."""
    packages = work / "packages"
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(packages), "chitchat-dataset"], check=True)
    sys.path.append(str(packages))
    from chitchat_dataset import Dataset

    for conversation in Dataset().values():
        turns = [" ".join(message["text"] for message in turn) for turn in conversation["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turn.strip() for turn in turns):  # an empty answer is refused
            roles = ("user", "assistant") * (len(turns) // 2)
            yield {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]}


def long_answers() -> Iterator[dict]:
    """Questions about parts of installed modules, answered with their source text."""
    import sysconfig

    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for part, start in enumerate(range(0, len(text) - 1999, 12_000), start=1):
            question = f"What is in part {part} of the module {path.stem}, and how is it written?"
            answer = text[start : start + 12_000]
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_corpus(path: Path, rows, size: int) -> None:
    """About `size` bytes of JSONL; a corpus that is smaller is gone through again."""
    rows = list(rows)
    temporary, written, turn = path.with_suffix(".tmp"), 0, 0
    with open(temporary, "wb") as file:
        while written < size:
            for row in rows:
                if written >= size:
                    break
                if turn:  # so that no conversation is there twice
                    first = row["messages"][0]
                    head = {**first, "content": f"{first['content']} ({turn})"}
                    row = {"messages": [head, *row["messages"][1:]]}
                written += file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            turn += 1
    temporary.rename(path)


def write_tokenizer(folder: Path) -> None:
    """mistral-common's tekken vocabulary as a Hugging Face tokenizer: 1,000 special tokens, 130,072 others.

    Tekken lists byte strings by rank. Any two entries that join to a third are a merge, of that entry's rank.
    """
    import mistral_common
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    source = Path(mistral_common.__file__).parent / "data/tekken_240911.json"
    tekken = json.loads(source.read_text())
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in tekken["vocab"][:130_072]]
    # Byte-level BPE spells bytes as printable characters: themselves, or from U+0100 on for those that are not.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    spell = {token: "".join(letters[b] for b in token) for token in tokens}
    merges = [
        (spell[token[:i]], spell[token[i:]])
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in spell and token[i:] in spell
    ]
    named = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10)), "<|im_start|>", "<|im_end|>", "<think>",
             "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]  # fmt: skip
    special = [*named, *(f"<SPECIAL_{i}>" for i in range(len(named), 1000))]
    vocabulary = {name: i for i, name in enumerate(special)}
    vocabulary |= {spell[token]: 1000 + rank for rank, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    pattern = pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<unk>"}')
    tokenizer.save(str(folder / "tokenizer.json"))


# --- runners -----------------------------------------------------------------------------------------------


def prep_config(work: Path, corpus: str, workers: int, **changed):
    """What `recipes/prep.py blend=file ...` composes."""
    from hydra import compose, initialize_config_dir

    from nemotron_sft import config, paths

    blend = work / f"{corpus}.json"
    blend.write_text(json.dumps({"datasets": [{"name": corpus, "path": str((work / f"{corpus}.jsonl").resolve())}]}))
    with initialize_config_dir(str(paths.CONF), version_base="1.3"):
        settings = {
            "blend": "file", "++blend.path": blend, "++tokenizer.model": work / "tokenizer", "workers": workers,
            "output_dir": work / f"packs-{corpus}-{workers}", "force": "true",
        } | changed  # fmt: skip
        return config.check(compose("prep", [f"{key}={value}" for key, value in settings.items()]), config.Prep)


def run_prep(work: Path, corpus: str, workers: int = 1, **changed) -> tuple[int, float, float]:
    from nemotron_sft.data import prep

    cfg = prep_config(work, corpus, workers, **changed)
    wall, cpu = time.perf_counter(), cpu_seconds()
    metadata = prep.run(cfg)
    tokens = sum(part["tokens"] for part in metadata["splits"].values())
    return tokens, cpu_seconds() - cpu, time.perf_counter() - wall


def run_repack(work: Path, corpus: str, workers: int = 1) -> tuple[int, float, float]:
    """What follows run_prep: it has left its tokens."""
    return run_prep(work, corpus, workers, pack_size=8192, force="false")


def run_floor(work: Path, corpus: str) -> tuple[int, float, float]:
    import orjson

    from nemotron_sft.data.chat import load_template
    from nemotron_sft.data.tokens import load_tokenizer

    tokenizer, template = load_tokenizer(str(work / "tokenizer")), load_template("nano3")
    tokenizer.encode_batch(["open it"])
    tokens, cpu, wall = 0, 0.0, 0.0
    with open(work / f"{corpus}.jsonl", "rb") as file:
        while lines := file.readlines(8 << 20):
            start, started = time.perf_counter(), cpu_seconds()
            records = list(map(orjson.loads, lines))
            cpu, wall = cpu + cpu_seconds() - started, wall + time.perf_counter() - start
            spans = [text for r in records for s in template.training_sequences(r["messages"], []) for _, text in s]
            start, started = time.perf_counter(), cpu_seconds()
            tokens += len(tokenizer.encode_batch(spans)[0])
            cpu, wall = cpu + cpu_seconds() - started, wall + time.perf_counter() - start
    return tokens, cpu, wall


def run_prefixes(work: Path, corpus: str) -> tuple[int, float, float]:
    tokenizer, lines = transformers_tokenizer(work), beginning(work, corpus, CHARACTERS["prefixes"])
    tokens, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    for line in lines:
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
        ids, mask, done = [], [], 0
        for i, message in enumerate(messages):
            trained = message["role"] == "assistant"
            until = tokenizer.apply_chat_template(
                messages[: i + 1], tokenize=False, add_generation_prompt=not trained, enable_thinking=False
            )
            assert whole.startswith(until), "the template rewrites what came before"
            span = tokenizer.encode(whole[done : len(until)], add_special_tokens=False)
            ids += span
            mask += [int(trained)] * len(span)
            done = len(until)
        tokens += len(ids)
    return tokens, cpu_seconds() - cpu, time.perf_counter() - wall


def run_template(work: Path, corpus: str) -> tuple[int, float, float]:
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = transformers_tokenizer(work)
    lines = beginning(work, corpus, CHARACTERS["template"])
    data = datasets.Dataset.from_list([json.loads(line) for line in lines])

    def encode(row):
        return {"input_ids": tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)}

    encode({"messages": json.loads(lines[0])["messages"]})
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = data.map(encode, remove_columns=["messages"])
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return sum(map(len, done["input_ids"])), cpu, wall


def run_encode(work: Path, corpus: str) -> tuple[int, float, float]:
    from tokenizers import Tokenizer

    from nemotron_sft.data.chat import load_template

    tokenizer, template = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json")), load_template("nano3")
    texts = [template.render(json.loads(line)["messages"]) for line in beginning(work, corpus, CHARACTERS["encode"])]
    tokens, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    for first in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False):
            tokens += len(encoding)
    return tokens, cpu_seconds() - cpu, time.perf_counter() - wall


def transformers_tokenizer(work: Path):
    from transformers import PreTrainedTokenizerFast

    from nemotron_sft.data.chat import BUILT_IN

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer/tokenizer.json"))
    tokenizer.chat_template = BUILT_IN["nano3"].jinja()
    return tokenizer


def beginning(work: Path, corpus: str, size: int) -> list[bytes]:
    with open(work / f"{corpus}.jsonl", "rb") as file:
        return file.readlines(size)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# --- the comparison ----------------------------------------------------------------------------------------


def measure(work: Path, runner: str, corpus: str, workers: int = 1) -> dict:
    """One run in a fresh process with a core for every worker."""
    command = [
        sys.executable,
        __file__,
        f"work={work}",
        f"runner={runner}",
        f"corpus={corpus}",
        f"workers={workers}",
    ]
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{runner} on {corpus} failed:\n{done.stderr}")
    tokens, cpu, wall = json.loads(done.stdout.splitlines()[-1])
    return {"tokens": tokens, "cpu": cpu, "wall": wall, "rate": tokens / cpu}


def child(work: Path, runner: str, corpus: str, workers: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    if runner in ("prep", "repack"):
        print(json.dumps(globals()[f"run_{runner}"](work, corpus, workers)))
    else:
        print(json.dumps(globals()[f"run_{runner}"](work, corpus)))


def make_inputs(work: Path, megabytes: dict[str, float]) -> None:
    """The tokenizer, and every corpus in every size asked for, unless they are there."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer/tokenizer.json").exists():
        write_tokenizer(work / "tokenizer")
    for corpus, size in megabytes.items():
        path = work / f"{corpus}.jsonl"
        if not path.exists() or abs(path.stat().st_size / (size * 1e6) - 1) > 0.1:
            write_corpus(path, short_chats(work) if "short" in corpus else long_answers(), int(size * 1e6))


def main(
    repeats: int = 3, megabytes: float = 96, large: float = 800, work: str = "output/bench", out: str | None = None
) -> None:
    from nemotron_sft.console import table

    folder = Path(work)
    sizes = {"short": megabytes, "long": megabytes}
    make_inputs(folder, sizes | ({"large-short": large, "large-long": large} if large else {}))
    runs: dict[str, list[dict]] = {}
    for _ in range(repeats):
        for corpus in TARGETS:
            for runner in ("prep", "repack", "floor", *CHARACTERS):
                runs.setdefault(f"{corpus} {runner}", []).append(measure(folder, runner, corpus))
            for workers in (1, 2) if large else ():
                run = measure(folder, "prep", f"large-{corpus}", workers)
                runs.setdefault(f"{corpus} {workers} workers", []).append(run)
            if large:
                run = measure(folder, "repack", f"large-{corpus}", 2)
                runs.setdefault(f"{corpus} repack, 2 workers", []).append(run)

    rate = {name: statistics.median(run["rate"] for run in group) for name, group in runs.items()}
    wall = {name: statistics.median(run["wall"] for run in group) for name, group in runs.items()}
    ratios, rows = {}, []
    for corpus, targets in TARGETS.items():
        ours = rate[f"{corpus} prep"]
        for runner, target in targets.items():
            theirs = rate[f"{corpus} {runner}"]
            ratios[f"{corpus} {runner}"] = ours / theirs
            rows.append((corpus, runner, f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}x", f"{target}x"))
        floor, again = rate[f"{corpus} floor"], rate[f"{corpus} repack"]
        ratios |= {f"{corpus} of the floor": ours / floor, f"{corpus} repacking": again / ours}
        rows.append((corpus, "floor", f"{floor:,.0f}", f"{ours:,.0f}", f"{ours / floor:.2f}x", "0.5x"))
        rows.append((corpus, "preparing, by repacking", f"{ours:,.0f}", f"{again:,.0f}", f"{again / ours:.1f}x", "4x"))
        if large:
            one, two = wall[f"{corpus} 1 workers"], wall[f"{corpus} 2 workers"]
            ratios[f"{corpus} workers"] = one / two
            again = two / wall[f"{corpus} repack, 2 workers"]
            ratios[f"{corpus} repacking, by the clock"] = again
            rows.append(
                (corpus, "preparing, by the clock", f"{two:.1f} s", f"{two / again:.1f} s", f"{again:.1f}x", "4x")
            )
            rows.append((corpus, "1 worker, by the clock", f"{one:.1f} s", f"{two:.1f} s", f"{one / two:.2f}x", "1.8x"))
    title = f"Whole prep, tokens per CPU second, median of {repeats}"
    table(title, ["corpus", "against", "theirs", "ours", "ratio", "target"], rows)
    report = {"ratios": {name: round(value, 2) for name, value in ratios.items()}, "runs": runs}
    if out:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["ratios"], indent=2))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    work = options.pop("work", "output/bench")
    if "runner" in options:
        child(Path(work), options["runner"], options["corpus"], int(options["workers"]))
    else:
        casts = {"repeats": int, "megabytes": float, "large": float, "out": str}
        main(work=work, **{key: casts[key](value) for key, value in options.items()})
