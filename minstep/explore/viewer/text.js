// The text: where each token came from, and the drafts that were not kept

{
  const origins = []; // of each position: { kind, pass, depth, rejected }
  const keptOf = (pass) => Math.min(pass.accepted, pass.new); // how many drafts stand in the text
  const passes = trace.passes ?? [],
    start = count - passes.reduce((sum, pass) => sum + pass.new, 0);
  let lost = []; // rejected drafts, which stand before the token that came in their place
  for (let at = 0; at < count; at++)
    origins.push({ kind: trace.passes ? "prompt" : "plain", rejected: [] });
  passes.forEach((pass, n) => {
    for (let k = 0; k < pass.new; k++) {
      const isKept = k < pass.accepted;
      const rejected = isKept ? [] : pass.drafts.slice(pass.accepted);
      origins[start + pass.before + k] = {
        kind: isKept ? "kept" : "own",
        pass: n,
        depth: k + 1,
        rejected,
      };
    }
    if (pass.new <= pass.accepted) lost = pass.drafts.slice(pass.new); // the text ended among them
  });
  const host = byId("text"),
    boxes = [];
  const kinds = { prompt: "of the prompt", own: "chosen by the main model" };
  const say = (at) => {
    const { kind, pass, depth, rejected } = origins[at],
      lines = [named(at)];
    if (tokens) lines.push(`token id ${tokens[at]}`);
    if (kind === "kept") lines.push(`draft of MTP depth ${depth}, kept`);
    else if (kinds[kind]) lines.push(kinds[kind]);
    if (pass !== undefined)
      lines.push(
        `pass ${pass}: ${passes[pass].accepted} of ${passes[pass].drafts.length} drafts accepted`,
      );
    if (rejected.length)
      lines.push(`in place of the draft ${quoted(rejected.slice(0, 1))}, rejected`);
    if (rejected.length > 1) lines.push(`dropped with it: ${quoted(rejected.slice(1))}`);
    return lines.join("\n");
  };
  const show = (at, isRead) => tell(say(at), boxOf(boxes[at]), isRead);
  const pick = (at) => {
    choose({ token: at });
    boxes[at].focus({ preventScroll: false });
    show(at, true);
  };
  for (let at = 0; at < count; at++) {
    const { kind, rejected } = origins[at],
      text = tokens ? piece(tokens[at]) : ` ${at} `;
    for (const id of rejected.slice(0, 1))
      host.append(make("del", { "aria-hidden": "true" }, visible(piece(id))));
    const box = make(
      "span",
      { className: `token ${kind}`, role: "option" },
      text.replace(/\n/g, "↵\n"),
    );
    box.setAttribute("aria-label", say(at).replace(/\n/g, ", "));
    box.onclick = () => pick(at);
    box.onfocus = () => {
      if (box.matches(":focus-visible")) show(at, true);
    };
    box.onpointerenter = () => show(at, false);
    box.onpointerleave = box.onblur = hush;
    boxes.push(box);
    host.append(box);
  }
  drawers.push(() => {
    boxes.forEach((box, at) => box.setAttribute("aria-selected", at === now.token));
    roving(host, boxes, now.token, pick);
  });
  if (!trace.passes) {
    byId("origin").append(
      note(
        "The trace says nothing of drafts: it is of a text that was given whole. " +
          "“minstep trace --prompt TEXT --max-tokens N” continues a text, and keeps its drafts.",
      ),
    );
  } else {
    const after = passes.slice(1),
      drafted = after.reduce((sum, pass) => sum + pass.drafts.length, 0);
    const kept = after.reduce((sum, pass) => sum + keptOf(pass), 0);
    const total = passes.reduce((sum, pass) => sum + pass.new, 0);
    byId("origin").append(
      make(
        "p",
        {},
        `${total} tokens in ${passes.length} forward passes; ` +
          `${kept} of ${drafted} drafts stand in the text.`,
      ),
    );
    const box = (name, text) =>
      make("span", {}, make("span", { className: `token ${name}` }, " a "), text);
    byId("origin").append(
      make(
        "div",
        { className: "legend" },
        box("prompt", "prompt"),
        box("own", "chosen by the main model"),
        box("kept", "draft that was kept"),
        make("span", {}, make("del", {}, "a"), "rejected draft, before what came instead"),
      ),
    );
    const shows = make("input", { type: "checkbox", checked: true });
    shows.onchange = () => host.classList.toggle("quiet", !shows.checked);
    byId("origin").append(make("label", {}, shows, " show rejected drafts"));
    const rows = passes.map((pass, n) => {
      const cells = pass.drafts.map((id, k) => {
        const isKept = k < keptOf(pass);
        return make(
          isKept ? "span" : "del",
          { className: isKept ? "token kept" : "" },
          visible(piece(id)),
        );
      });
      const own =
        pass.new > pass.accepted ? token(start + pass.before + pass.accepted) : "(the text ended)";
      return make(
        "tr",
        {},
        make("td", {}, `${n}`),
        make("td", {}, ...cells.flatMap((cell) => [cell, "  "]), cells.length ? "" : "none"),
        make("td", {}, cells.length ? `${keptOf(pass)} of ${cells.length}` : ""),
        make("td", { className: "token" }, own),
      );
    });
    const head = ["pass", "drafts", "kept", "then the main model’s own"].map((text) =>
      make("th", { scope: "col" }, text),
    );
    byId("passes").append(
      make(
        "details",
        {},
        make("summary", { className: "small" }, "Every pass"),
        make(
          "div",
          { className: "scroll" },
          make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
        ),
      ),
    );
    if (lost.length) host.append(...lost.map((id) => make("del", {}, visible(piece(id)))));
  }
}
