"""The tiny dataset of the smoke run: a seeded generator for chats, held-out prompts and a tokenizer.

    python -m nemotron_sft.tiny [--out data/tiny] [--seed 0]

    data/tiny/
      train.jsonl      {"messages": [...], "tools": [...]}: OpenAI chat records (tools only where they are used)
      heldout.jsonl    {"task", "messages", "tools", "answer"}: prompts that train.jsonl does not hold
      tokenizer/       a byte-level BPE of 2,048 entries with the special tokens of Nemotron 3

Every task is one that a transformer of a few layers learns within minutes and that generalises: its answers
come from the prompt (copying, looking up, sorting, calling a tool) or from a small table applied step by step
(adding digits). Words are spelled alike in prompt and answer (both at the start of a line, or both after a
space), so that one word is one token in both places. Output is byte-identical for a seed.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from nemotron_sft.data.chat import load_template

VOCABULARY = 2048
# Of each conversation kind; `chat` mixes copy, lookup, sort and add over one to three turns.
TRAIN = {"chat": 6000, "tool": 450, "reasoning": 400}
TURNS = (1, 2, 3)
HELDOUT = {"copy": 32, "lookup": 32, "sort": 32, "add": 32, "tool_call": 16, "tool_answer": 16}

# Names and order of the first entries follow NVIDIA's Nemotron tokenizers, which pad with <unk>. The markers of
# thinking and tool use are not "special" in the Hugging Face sense: decoding keeps them.
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


SYSTEM = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be exact.",
    "Help the user.",
)
KINDS = {
    "animal": words("eagle lion parrot rabbit tiger turtle wolf zebra"),
    "fruit": words("apple cherry lemon melon olive orange peach plum"),
    "sound": words("bell drum flute guitar organ piano trumpet violin"),
    "place": words("bridge castle desert garden harbor island market valley"),
    "gear": words("anchor basket candle hammer kettle ladder mirror needle"),
    "color": words("amber black blue green purple red silver white"),
    "count": [str(number) for number in range(10, 18)],
}
THINGS = [word for kind in ("animal", "fruit", "sound", "place", "gear") for word in KINDS[kind]]
# More words for the tokenizer alone, so that everyday English does not fall apart into letters.
WORDS = words(
    """able above across add after again against age ago air all almost along already also always among animal
another any around ask away back bad base because become before begin behind believe best better between big black
blue body book both boy bring brown build business buy carry case cause change child children church city class
clear close cold color come common complete could country course cover cut dark day deep different does done down
draw dream drive during each early earth east eat eight end enough even ever every example eye face fact fall family
far farm fast father feel few field figure fine fire first fish five fly food foot force form found four free friend
from front full game gave get girl give glass go gold good great green ground group grow half hand happen hard have
head hear heart heat heavy help here high hold home horse hot hour house hundred idea inch interest just keep kind
king knew know land language large late laugh lead learn leave less letter life light listen little live long look
love machine main make many mark matter mean measure might mile mind minute money month moon more morning most
mother mountain move much music must near need never new next night north note nothing notice now number object ocean
off often old once only open other our out over own page pair paper part pass pattern people perhaps person picture
piece place plain plan plant play point poor possible pound power present problem produce pull question quick quiet
rain reach ready real record red remember rest right road rock room round rule run same saw school science sea second
see seem sentence serve seven several shape ship short show side simple since sing sit six size sleep slow small snow
some song soon sound south space special spell stand start state stay step still stood stop story street strong study
such summer sun sure surface system table take talk teach ten test than their them then these thing think thought
thousand three through time together told took top toward town travel tree true turn two under unit until usual verb
very voice voyage walk wall want war warm wash watch water wave week well went were west what wheel where which while
white whole why wide wild will wind winter without woman wonder wood word work world would write year yellow young
arrow beacon bottle broom bucket button cabin cloud carpet circle copper crayon diamond door engine fence flag flame
flower fork forest ginger globe glove harbor helmet island ivory jewel kettle key ladder lantern letter magnet map maple
marble nest olive oven paddle paper pebble pencil pepper pillow planet plum pocket puzzle rabbit ribbon ring rope saddle
sail salt scarf shell shovel silver spoon tent thimble tower trumpet tulip turtle umbrella valley vase violin wagon
walnut whistle window wolf yarn zebra"""
)
LETTERS = "abcdefghijklmnop"
FUNCTIONS = {
    "price": ("The price of an item.", "how much is it?"),
    "stock": ("How many of an item are left.", "how many are left?"),
    "weight": ("The weight of an item.", "how heavy is it?"),
}

Turn = tuple[str, str]  # a user message and its answer


def copy(rng: random.Random) -> Turn:
    """Repeat a line of three to five words."""
    line = " ".join(rng.sample(THINGS, rng.randint(3, 5)))
    return f"{rng.choice(('Copy:', 'Repeat:'))}\n{line}", line


def lookup(rng: random.Random) -> Turn:
    """Find one to three rows of a table of three to five, each a kind of thing and one of that kind."""
    kinds = rng.sample(list(KINDS), rng.randint(3, 5))
    rows = [f"{kind} {rng.choice(KINDS[kind])}" for kind in kinds]
    asked = rng.sample(range(len(kinds)), rng.randint(1, 3))
    question = " ".join(kinds[index] for index in asked)
    answer = "\n".join(rows[index] for index in asked)
    return "\n".join([rng.choice(("Look up:", "Find:")), *rows, f"{question}?"]), answer


def sort(rng: random.Random) -> Turn:
    """Put three or four letters in order."""
    letters = rng.sample(LETTERS, rng.randint(3, 4))
    return f"{rng.choice(('Sort:', 'Order:'))}\n{' '.join(letters)}", " ".join(sorted(letters))


def add(rng: random.Random) -> Turn:
    """Add two or three digits, one step a line."""
    digits = [rng.randint(0, 9) for _ in range(rng.randint(2, 3))]
    return f"{rng.choice(('Add:', 'Sum:'))}\n{'+'.join(map(str, digits))}", "\n".join(sum_steps(digits))


def sum_steps(digits: list[int]) -> list[str]:
    """The running sum written out: [3, 4, 5] -> ["3+4=7", "7+5=12"]."""
    steps, total = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    return steps


CHAT: dict[str, Callable[[random.Random], Turn]] = {"copy": copy, "lookup": lookup, "sort": sort, "add": add}


def tool(name: str) -> dict:
    """The OpenAI definition of one function, which takes a list of items."""
    items = {"type": "array", "items": {"type": "string"}}
    parameters = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    return {
        "type": "function",
        "function": {"name": name, "description": FUNCTIONS[name][0], "parameters": parameters},
    }


def tool_turn(rng: random.Random, name: str, item: str) -> list[dict]:
    """User question, call, tool result and final answer: four messages."""
    value = rng.choice(KINDS["count"])
    call = {"name": name, "arguments": json.dumps({"items": [item]})}
    return [
        {"role": "user", "content": f"{item}, {FUNCTIONS[name][1]}"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_0", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": f"{item} {value}"},
        {"role": "assistant", "content": f"{item} {value}"},
    ]


def call_text(name: str, item: str) -> str:
    """How Nemotron 3's chat template writes the call."""
    argument = json.dumps([item])
    return f"<tool_call>\n<function={name}>\n<parameter=items>\n{argument}\n</parameter>\n</function>\n</tool_call>"


def reasoning(rng: random.Random) -> list[dict]:
    """One user turn whose answer is thought out first: a sum or a look-up."""
    user, worked = rng.choice((add, lookup))(rng)
    answer = worked.replace("=", " ").split()[-1]
    return [
        {"role": "user", "content": user},
        {"role": "assistant", "reasoning_content": worked, "content": answer},
    ]


def messages(turns: Iterable[Turn]) -> list[dict]:
    """User and assistant messages of plain turns."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def material(task: str, user: str, answer: str) -> str:
    """What makes a prompt itself, however it is put: its lines below the first, or the letters it sorts."""
    return answer if task == "sort" else user.partition("\n")[2]


def generate(seed: int = 0) -> tuple[list[dict], list[dict]]:
    """The training conversations and the held-out prompts with their answers.

    What a held-out prompt asks about (the words to copy, the table and the question, the set of letters, the
    sum, the pair of function and item) never occurs in training, under whatever words and after whatever turns.
    """
    rng = random.Random(seed)
    reserved: set[str] = set()
    heldout = heldout_chats(rng, reserved)
    pairs = [(name, item) for name in FUNCTIONS for item in THINGS]
    rng.shuffle(pairs)
    cut = HELDOUT["tool_call"] + HELDOUT["tool_answer"]
    heldout += heldout_tools(rng, pairs[:cut])
    train = training(rng, reserved, pairs[cut:])
    asked = {m["content"] for record in train for m in record["messages"] if m["role"] == "user"}
    last = [[m["content"] for m in record["messages"] if m["role"] == "user"][-1] for record in heldout]
    assert not asked & set(last), "a held-out prompt occurs in training"
    return train, heldout


def system(rng: random.Random) -> dict:
    """A system message."""
    return {"role": "system", "content": rng.choice(SYSTEM)}


def fresh(rng: random.Random, task: str, reserved: set[str]) -> Turn:
    """A question and answer of `task` whose material is not reserved for the held-out prompts."""
    while True:
        user, answer = CHAT[task](rng)
        if material(task, user, answer) not in reserved:
            return user, answer


def heldout_chats(rng: random.Random, reserved: set[str]) -> list[dict]:
    """Held-out prompts without tools; what they ask about is added to `reserved`."""
    heldout = []
    for task in CHAT:
        for index in range(HELDOUT[task]):
            before = [CHAT[rng.choice(list(CHAT))](rng)] if index % 4 == 3 else []
            # Two digits are a table of 100 sums, all of it in training: only longer sums are held out.
            user, answer = fresh(rng, task, reserved)
            while task == "add" and user.count("+") < 2:
                user, answer = fresh(rng, task, reserved)
            reserved.add(material(task, user, answer))
            prompt = [system(rng), *messages(before), {"role": "user", "content": user}]
            heldout.append({"task": task, "messages": prompt, "answer": answer})
    return heldout


def heldout_tools(rng: random.Random, pairs: list[tuple[str, str]]) -> list[dict]:
    """Held-out prompts about pairs of function and item: the call, and then the answer to its result."""
    heldout = []
    for index, (name, item) in enumerate(pairs):
        turn = tool_turn(rng, name, item)
        if index < HELDOUT["tool_call"]:
            task, prompt, answer = "tool_call", turn[:1], call_text(name, item)
        else:
            task, prompt, answer = "tool_answer", turn[:3], turn[3]["content"]
        record = {"task": task, "messages": [system(rng), *prompt], "tools": [tool(name)], "answer": answer}
        heldout.append(record)
    return heldout


def training(rng: random.Random, reserved: set[str], pairs: list[tuple[str, str]]) -> list[dict]:
    """The training conversations, without what is reserved, and with these pairs of function and item."""
    train: list[dict] = []
    for _ in range(TRAIN["chat"]):
        turns = [fresh(rng, rng.choice(list(CHAT)), reserved) for _ in range(rng.choice(TURNS))]
        train.append({"messages": [system(rng), *messages(turns)]})
    for _ in range(TRAIN["tool"]):
        name = rng.choice(list(FUNCTIONS))
        item = rng.choice([item for other, item in pairs if other == name])
        train.append({"messages": [system(rng), *tool_turn(rng, name, item)], "tools": [tool(name)]})
    while len(train) < sum(TRAIN.values()):
        turn = reasoning(rng)
        if turn[0]["content"].partition("\n")[2] not in reserved:
            train.append({"messages": [system(rng), *turn]})
    rng.shuffle(train)
    return train


def spellings() -> list[str]:
    """Every word and every number below 100, at the start of a line and after a space, often enough to be merged."""
    once = [*KINDS, *THINGS, *KINDS["color"], *LETTERS, *map(str, range(100))] * 20 + WORDS
    return [f"{word} {word}" for word in once]


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` of VOCABULARY entries; any text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False) for token in (*SPECIAL, *MARKERS)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer makes every one of them special; only SPECIAL is to vanish in decoding.
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(state))


def write(out: Path, seed: int = 0) -> None:
    """Write train.jsonl, heldout.jsonl and tokenizer/ under `out`."""
    train, heldout = generate(seed)
    template = load_template("nano3")
    chats = (template.render(record["messages"], record.get("tools")) for record in train)
    tokenizer = train_tokenizer(chain(chats, spellings()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer/tokenizer.json"))
    (out / "tokenizer/tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, records in (("train", train), ("heldout", heldout)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
