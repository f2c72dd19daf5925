// Attention: one head large, all heads small, and what the chosen token looks at

{
  const host = byId("attention"),
    grid = new Grid(
      "Attention of one head: up and down choose the token that looks, left and right at what",
    );
  const heads = make("div", { id: "heads", role: "radiogroup", "aria-label": "Head" });
  const caption = make("p", { className: "small" }),
    alarm = make("div"),
    seen = make("div", { className: "text" });
  const share = (layer, head, query, key) => Math.sqrt(layer.prob(head, query, key));
  const paintCell = (layer, head, context, row, column, x, y, w, h) => {
    if (!layer.sees(row, column)) return;
    context.fillStyle = colour("cell");
    context.fillRect(x, y, w, h);
    context.fillStyle = colour(kind(layer));
    context.globalAlpha = share(layer, head, row, column);
    context.fillRect(x, y, w, h);
  };
  const thumbnail = (layer, head, canvas) => {
    // a pixel a cell, stretched by the browser
    const T = layer.queries,
      context = canvas.getContext("2d");
    canvas.width = canvas.height = T;
    const cell = colour("cell"),
      full = colour(kind(layer));
    for (let row = 0; row < T; row++) {
      for (let column = 0; column <= row; column++) {
        if (!layer.sees(row, column)) continue;
        context.globalAlpha = 1;
        context.fillStyle = cell;
        context.fillRect(column, row, 1, 1);
        context.globalAlpha = share(layer, head, row, column);
        context.fillStyle = full;
        context.fillRect(column, row, 1, 1);
      }
    }
  };
  let drawn = null; // which layer the thumbnails show, and on what colour of page
  const pick = (head) => {
    choose({ head });
    heads.children[head].focus();
  };
  const drawHeads = (layer) => {
    const wanted = `${layer.n} ${colour("page")}`;
    if (drawn !== wanted) {
      heads.replaceChildren(
        ...Array.from({ length: layer.heads }, (_, head) => {
          const canvas = make("canvas", { "aria-hidden": "true" });
          thumbnail(layer, head, canvas);
          const button = make("button", { type: "button", role: "radio" }, canvas, `head ${head}`);
          button.onclick = () => choose({ head });
          return button;
        }),
      );
      drawn = wanted;
    }
    const items = [...heads.children];
    items.forEach((item, head) => item.setAttribute("aria-checked", head === now.head));
    roving(heads, items, now.head, pick);
  };
  const draw = () => {
    const layer = layers[now.layer];
    if (!layer.probs) {
      host.replaceChildren(
        note(
          `The attention probabilities of ${title(layer)} are not in this trace. “minstep trace” ` +
            "keeps those of all layers where the text is not long, “minstep record” only where " +
            "--names asks for them.",
        ),
      );
      drawn = null;
      return;
    }
    if (drawn === null)
      host.replaceChildren(
        alarm,
        caption,
        make("div", { className: "columns" }, grid.element, heads),
        seen,
      );
    now.head = Math.min(now.head, layer.heads - 1);
    const T = layer.queries,
      query = Math.min(now.token, T - 1),
      earliest = Math.max(0, query - (layer.window ?? T) + 1),
      key = Math.max(earliest, Math.min(now.key, query)); // the nearest that the layer may see
    const size = Math.max(
      3,
      Math.min(24, Math.floor((room(host, 110) * (innerWidth > 900 ? 0.58 : 1)) / T)),
    );
    const { head } = now,
      groups = layer.groups
        ? `, key-value head ${Math.floor((head * layer.groups) / layer.heads)}`
        : "";
    alarm.replaceChildren(
      ...(layer.unseen > 0
        ? [
            note(
              `Up to ${plain(layer.unseen)} lies where this layer must not look: a mask is wrong.`,
              "alarm",
            ),
          ]
        : []),
    );
    const window = layer.window ? `, window ${layer.window}` : "";
    const joined = layer.depth ? `; position i joins its state with token i + ${layer.depth}` : "";
    caption.textContent = `${title(layer)}, head ${head}${groups}${window}${joined}`;
    grid.draw({
      rows: T,
      columns: T,
      width: size,
      height: size,
      paint: (...cell) => paintCell(layer, head, ...cell),
      at: () => [query, key],
      move: (row, column) => choose({ token: row, key: column }),
      rowName: (row) => clipped(token(row), 11),
      columnName: token,
      tell: (row, column) => {
        const first = `${named(row)} → ${named(column)}`;
        if (!layer.sees(row, column)) {
          const why = column > row ? "it comes later" : `outside the window of ${layer.window}`;
          return `${first}\nnot visible: ${why}`;
        }
        const open = layer.open
          ? `\ngate of the head at “${token(row)}” ${layer.open(row, head).toFixed(2)}`
          : "";
        const p = layer.prob(head, row, column).toFixed(4);
        return `${first}\nprobability ${p}\n${row - column} back, head ${head}${open}`;
      },
    });
    drawHeads(layer);
    const looks = Array.from({ length: query + 1 }, (_, at) =>
      layer.sees(query, at) ? layer.prob(head, query, at) : 0,
    );
    const best = looks
      .map((p, at) => [p, at])
      .sort((one, other) => other[0] - one[0])
      .slice(0, 4);
    const most = best.map(([p, at]) => `${named(at)} (${percent(p)})`).join(", ");
    seen.replaceChildren(
      make(
        "div",
        { className: "small muted" },
        `Head ${head} of ${named(query)} looks most at ${most}`,
      ),
    );
    looks.forEach((p, at) => {
      const box = make(
        "span",
        { className: "seen token" },
        tokens ? piece(tokens[at]).replace(/\n/g, "↵\n") : ` ${at} `,
      );
      const share = (50 * Math.sqrt(p)).toFixed(1);
      box.style.background = `color-mix(in srgb, var(--${kind(layer)}) ${share}%, transparent)`;
      box.onpointerenter = () =>
        tell(`${named(at)}\nprobability ${p.toFixed(4)}`, boxOf(box), false);
      box.onpointerleave = hush;
      box.onclick = () => choose({ key: at });
      seen.append(box);
    });
  };
  drawers.push(draw);
}
