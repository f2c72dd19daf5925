// Experts: the chosen layer over all tokens, the chosen token over all layers

{
  const host = byId("experts"),
    grid = new Grid(
      "Experts of one layer: up and down choose the expert, left and right the token",
    );
  const caption = make("p", { className: "small" }),
    choices = make("div", { id: "choices", className: "scroll" });
  let expert = 0;
  host.append(caption, make("div", { className: "columns" }, grid.element, choices));
  const draw = () => {
    const layer = layers[now.layer];
    grid.element.hidden = !layer.ids;
    const table = layers
      .filter((each) => each.ids && now.token < each.ids.length)
      .map((each) => {
        const chosen = each.ids[now.token].map(
          (id, n) => `${id}${each.weights ? ` × ${plain(each.weights[now.token][n])}` : ""}`,
        );
        return make(
          "tr",
          {},
          make("th", { scope: "row" }, short(each)),
          make("td", {}, chosen.join(",  ")),
        );
      });
    choices.replaceChildren(
      make(
        "table",
        {},
        make(
          "caption",
          { className: "small", style: "text-align:left" },
          `Experts of ${named(now.token)}`,
        ),
        make(
          "thead",
          {},
          make(
            "tr",
            {},
            make("th", { scope: "col" }, "layer"),
            make("th", { scope: "col" }, "expert × weight"),
          ),
        ),
        make("tbody", {}, ...table),
      ),
    );
    if (!layer.ids) {
      caption.textContent =
        layer.experts === 0
          ? `${title(layer)} has a dense MLP: nothing is chosen.`
          : `The choices of ${title(layer)} are not in this trace.`;
      return;
    }
    const T = layer.ids.length,
      E = layer.experts,
      counts = new Array(E).fill(0);
    const weight = layer.ids.map(() => new Map());
    layer.ids.forEach((ids, at) =>
      ids.forEach((id, n) => {
        counts[id] += 1;
        weight[at].set(id, layer.weights ? layer.weights[at][n] : 1);
      }),
    );
    const most = weight.reduce((high, each) => Math.max(high, ...each.values()), 1e-9),
      top = layer.ids[0].length;
    const fair = (T * top) / E,
      largest = Math.max(...counts, fair);
    const unused = counts.filter((n) => n === 0).length;
    caption.textContent =
      `${title(layer)}: ${top} of ${E} experts a token. Bars are the tokens of each expert, the ` +
      `line is a fair share: ${plain(fair)}. The most used has ${Math.max(...counts)}; ` +
      `${unused} ${unused === 1 ? "has" : "have"} none.`;
    expert = Math.min(expert, E - 1);
    const width = Math.max(
      4,
      Math.min(16, Math.floor((room(host, 100) * (innerWidth > 900 ? 0.76 : 1) - 90) / T)),
    );
    grid.draw({
      rows: E,
      columns: T,
      width,
      height: E > 160 ? 3 : E > 64 ? 5 : 14,
      margin: 84,
      paint: (context, row, column, x, y, w, h) => {
        context.fillStyle = colour("cell");
        context.fillRect(x, y, w, h);
        context.fillStyle = colour("expert");
        const its = weight[column].get(row);
        context.globalAlpha =
          its === undefined
            ? layer.score
              ? 0.3 * layer.score(column, row)
              : 0
            : 0.5 + (0.5 * its) / most;
        context.fillRect(x, y, w, h);
      },
      aside: (context, row, x, y, h) => {
        context.fillStyle = colour("expert");
        context.fillRect(x, y, (52 * counts[row]) / largest, h);
        context.fillStyle = colour("ink");
        context.fillRect(x + (52 * fair) / largest, y, 1, h + 1);
        context.font = "11px ui-monospace, monospace";
        context.textBaseline = "middle";
        context.fillStyle = colour("muted");
        if (h > 9) context.fillText(counts[row], x + 57, y + h / 2 + 1);
      },
      at: () => [expert, Math.min(now.token, T - 1)],
      move: (row, column) => {
        expert = row;
        choose({ token: column });
      },
      rowName: (row) => `${row}`,
      columnName: token,
      tell: (row, column) => {
        const its = weight[column].get(row),
          lines = [`expert ${row}, ${named(column)}`];
        lines.push(
          its === undefined
            ? "not chosen"
            : layer.weights
              ? `chosen, weight ${plain(its)}`
              : "chosen",
        );
        if (layer.score)
          lines.push(`router score ${layer.score(column, row).toFixed(3)} (before the bias)`);
        lines.push(`this token: experts ${layer.ids[column].join(", ")}`);
        if (layer.margin)
          lines.push(`margin of the last one chosen ${plain(layer.margin[column])}`);
        return lines.join("\n");
      },
    });
  };
  if (layers.some((layer) => layer.ids)) drawers.push(draw);
  else host.replaceChildren(note("No choice of experts is in this trace."));
}
