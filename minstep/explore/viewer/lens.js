// Logit lens: a table of words

{
  const host = byId("lens"),
    names = Object.keys(trace.lens);
  if (trace.no_lens)
    host.append(
      note(`${trace.no_lens}${names.length ? " The logits it holds are shown all the same." : ""}`),
    );
  else if (!names.length)
    host.append(note("No lens: neither states nor logits are in this trace."));
  const layerOf = (name) =>
    layers.findIndex((layer) => name === layer.name || name.startsWith(`${layer.name}.`));
  const rows = names.map((name) => {
    const at = layerOf(name),
      layer = layers[at],
      depth = layer?.depth ?? 0;
    const isLast = layer && !depth && !layers.some((each) => !each.depth && each.n > layer.n);
    const text =
      name === "lm_head"
        ? "output"
        : layer
          ? `${short(layer)}${isLast ? " = output" : ""}`
          : "embed";
    const full =
      name === "lm_head" ? "the model’s own logits" : layer ? title(layer) : "the embedding";
    return { ...trace.lens[name], at, depth, text, full, cells: [] };
  });
  if (rows.length) {
    let focus = Math.max(
      0,
      rows.findIndex((row) => row.at === now.layer),
    );
    const head = Array.from({ length: count }, (_, at) => make("th", { scope: "col" }, token(at)));
    const say = (row, column) => {
      const { ids, probs, true: own, depth, full } = rows[row],
        next = column + 1 + depth;
      if (column >= ids.length) return `${full}, ${named(column)}\n${NO_POSITION}`;
      const after = depth ? `position ${next}` : "the next token";
      const best = ids[column].map(
        (id, n) => `“${visible(piece(id))}” ${percent(probs[column][n])}`,
      );
      const text =
        own[column] == null
          ? `the text ${tokens ? "ends here" : "is not in this trace"}`
          : `the text has “${token(next)}” ${percent(own[column])}`;
      return [`${full}, ${named(column)}`, `says of ${after}:`, ...best, text].join("\n");
    };
    const pick = (row, column) => {
      focus = row;
      choose({ token: column, ...(rows[row].at >= 0 ? { layer: rows[row].at } : {}) });
      rows[row].cells[column].focus({ preventScroll: false });
      tell(say(row, column), boxOf(rows[row].cells[column]), true);
    };
    const body = rows.map((row, r) => {
      const line = make(
        "tr",
        { role: "row" },
        make("th", { scope: "row", role: "rowheader" }, row.text),
      );
      for (let column = 0; column < count; column++) {
        const cell = make("td", { role: "gridcell", tabIndex: -1 });
        if (column < row.ids.length) {
          const id = row.ids[column][0],
            p = row.probs[column][0],
            next = column + 1 + row.depth;
          cell.append(make("span", {}, visible(piece(id))), make("small", {}, percent(p)));
          const share = (45 * p).toFixed(1);
          cell.style.background = `color-mix(in srgb, var(--guess) ${share}%, var(--cell))`;
          if (tokens && next < count && tokens[next] === id) cell.className = "hit";
        }
        cell.onclick = () => pick(r, column);
        cell.onpointerenter = () => tell(say(r, column), boxOf(cell), false);
        cell.onpointerleave = cell.onblur = hush;
        cell.onfocus = () => {
          if (cell.matches(":focus-visible")) tell(say(r, column), boxOf(cell), true);
        };
        row.cells.push(cell);
        line.append(cell);
      }
      return line;
    });
    const table = make(
      "table",
      {
        role: "grid",
        "aria-label": "Logit lens: up and down choose the layer, left and right the token",
      },
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "after"), ...head)),
      make("tbody", {}, ...body),
    );
    const scroll = make("div", { className: "scroll" }, table);
    table.onkeydown = (event) => {
      const to = step(event, [focus, now.token], rows.length, count);
      if (to) pick(...to);
    };
    host.append(scroll);
    let chosen = null;
    drawers.push(() => {
      if (rows[focus].at !== now.layer && rows.some((row) => row.at === now.layer))
        focus = rows.findIndex((row) => row.at === now.layer);
      if (chosen) {
        chosen.tabIndex = -1;
        chosen.removeAttribute("aria-selected");
      }
      chosen = rows[focus].cells[now.token];
      chosen.tabIndex = 0;
      chosen.setAttribute("aria-selected", "true");
      head.forEach((cell, at) => cell.classList.toggle("now", at === now.token));
      body.forEach((line, r) => line.firstChild.classList.toggle("now", r === focus));
      const label = body[0].firstChild.offsetWidth,
        left = chosen.offsetLeft - label;
      if (
        left < scroll.scrollLeft ||
        left + chosen.offsetWidth + label > scroll.scrollLeft + scroll.clientWidth
      )
        scroll.scrollLeft = left - 40;
    });
  }
}
