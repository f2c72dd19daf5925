"""Tokens a second of the shipped model with drafts and without, on text of the kind it has learned.

Checked by: tests/bench/test_bench.py
"""

import numpy as np

from minstep.bench.decoding import NEW, PROMPT, Model, continued
from minstep.bench.peers import Setup
from minstep.bench.timing import Block, Found, Row, rounds
from minstep.explore.acceptance import beginnings
from minstep.store.checkpoint import open_checkpoint
from minstep.store.config_file import find_config
from minstep.text.tokenizer import load_tokenizer
from minstep.train.data import encode_documents, read_corpus

PROMPTS = 8  # beginnings of held-out documents


def drafts(setup: Setup) -> Found:
    """Seconds of a new token, the drafts' share in them, against decoding one at a time.

    Held out is part of the documentation inside this Python. Errors where a text is not the same.
    """
    folder = find_config("trained")
    checkpoint, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    assert tokenizer
    model = Model(folder, checkpoint.weights(), checkpoint.config)
    documents = read_corpus().held_out
    texts = [encode_documents([each], tokenizer).tolist()[:-1] for each in documents]  # but for eos
    rng = np.random.default_rng(setup.seed)
    prompts = beginnings(texts, 2 if setup.quick else PROMPTS, PROMPT, rng)
    depths = len(model.config.mtp_layers)
    said: dict[int, list[list[int]]] = {}

    def side(count: int) -> Block:
        def block() -> float:
            continued(model, prompts[0], 8, count)
            runs = [continued(model, prompt, NEW, count) for prompt in prompts]
            said[count] = [tokens for _, _, tokens in runs]
            return sum(rest for _, rest, _ in runs) / sum(len(each) - 1 for each in said[count])

        return block

    blocks = {"ours": side(depths), "one draft": side(1), "without": side(0)}
    times = rounds(blocks, setup.rounds)
    row = Row("drafts", f"with drafts, {depths} a pass", times.pop("ours"), times)
    same = all(texts == said[0] for texts in said.values())
    return Found([row], [] if same else ["drafts: they change a greedy text"])
