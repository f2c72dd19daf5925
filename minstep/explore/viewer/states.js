// Sizes of the states

{
  const host = byId("norms"),
    grid = new Grid(
      "Sizes by layer and token: up and down choose the layer, left and right the token",
    );
  const measures = {
    state: "the state after the layer",
    attention: "what attention adds",
    mlp: "what the MLP or the experts add",
  };
  const scale = make("p", { className: "small muted" }),
    legend = make("div", { className: "legend", role: "radiogroup", "aria-label": "Which size" });
  for (const [name, text] of Object.entries(measures)) {
    const input = make("input", { type: "radio", name: "measure", checked: name === now.measure });
    input.disabled = !layers.some((layer) => layer[name]);
    input.onchange = () => choose({ measure: name });
    legend.append(
      make("label", {}, input, ` ${text}${input.disabled ? " (not in this trace)" : ""}`),
    );
  }
  const draw = () => {
    const rows = layers
      .map((layer, n) => ({
        name: short(layer),
        full: title(layer),
        values: layer[now.measure],
        layer: n,
      }))
      .filter((row) => row.values);
    if (now.measure === "state" && trace.embedding)
      rows.unshift({ name: "embed", full: "the embedding", values: trace.embedding, layer: -1 });
    if (!rows.length) {
      host.replaceChildren(legend, note("None of these are in this trace."));
      return;
    }
    const sizes = rows.flatMap((row) => row.values).filter((x) => x > 0);
    const low = Math.log(sizes.reduce((one, other) => Math.min(one, other), Infinity));
    const high = Math.log(sizes.reduce((one, other) => Math.max(one, other), 0));
    const shade = (x) => (x > 0 ? 0.06 + (0.94 * (Math.log(x) - low)) / (high - low || 1) : 0);
    scale.textContent =
      `Faintest ${plain(Math.exp(low))}, strongest ${plain(Math.exp(high))}; ` +
      "the scale is logarithmic.";
    if (!grid.element.isConnected) host.replaceChildren(legend, scale, grid.element);
    const at = () => [
      Math.max(
        0,
        rows.findIndex((row) => row.layer === (now.row < 0 ? -1 : now.layer)),
      ),
      now.token,
    ];
    grid.draw({
      rows: rows.length,
      columns: count,
      width: Math.max(5, Math.min(22, Math.floor(room(host, 70) / count))),
      height: rows.length > 24 ? 14 : 22,
      paint: (context, row, column, x, y, w, h) => {
        if (column >= rows[row].values.length) return;
        context.fillStyle = colour("cell");
        context.fillRect(x, y, w, h);
        context.fillStyle = colour("norm");
        context.globalAlpha = shade(rows[row].values[column]);
        context.fillRect(x, y, w, h);
      },
      at,
      move: (row, column) =>
        choose({
          token: column,
          row: rows[row].layer,
          ...(rows[row].layer >= 0 ? { layer: rows[row].layer } : {}),
        }),
      rowName: (row) => rows[row].name,
      columnName: token,
      tell: (row, column) => {
        const { full, values } = rows[row];
        const what = measures[now.measure].replace(" after the layer", "");
        const said = column < values.length ? `${what}: ${plain(values[column])}` : NO_POSITION;
        return `${full}, ${named(column)}\n${said}`;
      },
    });
  };
  drawers.push(draw);
}
