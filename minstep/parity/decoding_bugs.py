"""Bugs of ports that no layer can show: of loading files, of text, and of decoding.

Checked by: tests/parity/test_known_bugs.py, tests/parity/test_mutations.py
"""

from minstep.parity.known_bugs import ALL, Footgun

UNSEEN = {
    "shards": (
        Footgun("shards found by a pattern with -of-", "store.checkpoint", "return weight_map", 'return {n: s for n, s in weight_map.items() if "-of-" in s}'),
    ),
    "moe_layers_enum": (
        Footgun("layer numbers read as characters", "config", 'listed.split(",")', 'listed.replace(",", "")'),
        Footgun("layer numbers compared with characters", "config", "moe if n in moe_layers", 'moe if n in list(keys.raw["moe_layers_enum"])'),
    ),
    "tool calls": (
        Footgun("rest of a piece of text dropped behind a call", "text.reply", "self._at = end if end >= 0 else len(self._text)", "self._at = len(self._text)"),
    ),
    "decoding": (
        Footgun("drafts kept unchecked", "sampling", "if rng.random() >= chance:", "if False:"),
        Footgun("end token looked for in the last place only", "generate", "enumerate(new, start=1) if token in ends", "enumerate(new, start=1) if n == len(new) and token in ends"),
        Footgun("rejected drafts left in the cache", "generate", "cache.truncate(len(tokens) + accepted)", "pass"),
        Footgun("rows computed from drafts never computed again", "mtp", "self._settle(len(tokens) - self.count - self.first)", "self._settle(len(tokens) - 1 - self.first)"),
    ),
}  # fmt: skip
# Where a bug of mtp_forward needs another line to be in the Drafter too, which decodes: by bug.
IN_DRAFTER = {
    footgun.bug: footgun
    for footgun in (
        Footgun("hidden passed between MTP depths after the norm", "mtp", "x, layer,", "rms_norm(x, self.weights.norm if k == 1 else self.weights.mtp[k - 2].shared_head_norm, eps), layer,"),
        Footgun("main model's state fed to every MTP depth", "mtp", "x, layer,", "self.states[: len(x)], layer,"),
        Footgun("norm before an MTP head applied twice", "mtp", "mtp_head(x[-1:],", "mtp_head(rms_norm(x[-1:], self.weights.mtp[k - 1].shared_head_norm, self.config.rms_norm_eps),"),
        Footgun("MTP depth fed the token before", "mtp", "text[self.first + k :]", "text[self.first + k - 1 : -1]"),
    )
}  # fmt: skip
EVERY = [*ALL, *(footgun for row in UNSEEN.values() for footgun in row)]
