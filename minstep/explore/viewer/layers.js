// Layers

{
  const main = layers.filter((layer) => !layer.depth).length,
    mtp = layers.length - main;
  const inside = trace.passes
    ? `, ${trace.passes.reduce((sum, pass) => sum + pass.new, 0)} of them written by the model`
    : "";
  byId("summary").textContent =
    `${count} tokens${inside}; ${main} layers${mtp ? ` and ${mtp} MTP layers` : ""}; ` +
    `computed in ${trace.dtype}.`;
  const cells = layers.map((layer, n) => {
    const absent = isAbsent(layer) ? "absent" : "";
    const cell = make(
      "button",
      {
        type: "button",
        role: "radio",
        className: `cell ${kind(layer)} ${layer.experts ? "moe" : ""} ${absent}`,
      },
      short(layer),
    );
    cell.setAttribute("aria-label", about(layer));
    cell.onclick = () => choose({ layer: n });
    cell.onpointerenter = () => tell(about(layer), boxOf(cell), false);
    cell.onpointerleave = hush;
    return cell;
  });
  const mark = (text) => make("span", { className: "mark", "aria-hidden": "true" }, text);
  byId("layers").append(mark("embed →"), ...cells.slice(0, main), mark("→ head"));
  if (mtp) byId("layers").append(mark("  drafts:"), ...cells.slice(main));
  const legend = make("div", { className: "legend" });
  for (const [name, text] of [
    ["full", "full attention"],
    ["sliding", "sliding window"],
    ["unsaid", "attention not said"],
  ]) {
    if (layers.some((layer) => kind(layer) === name)) legend.append(swatch(name, text));
  }
  if (layers.some((layer) => layer.experts)) legend.append(swatch("unsaid moe", "filled: experts"));
  if (layers.some(isAbsent)) legend.append(make("span", {}, "dotted: not in this trace"));
  byId("layers").after(legend);
  const pick = (n) => {
    choose({ layer: n });
    cells[n].focus();
  };
  drawers.push(() => {
    cells.forEach((cell, n) => cell.setAttribute("aria-checked", n === now.layer));
    roving(byId("layers"), cells, now.layer, pick);
    byId("chosen").textContent = `${about(layers[now.layer])}. Token ${named(now.token)}.`;
  });
}

function about(layer) {
  const sees =
    layer.kind === "sliding_attention"
      ? `sliding attention over ${layer.window} positions`
      : layer.kind
        ? "full attention"
        : "attention of a kind that the trace does not say";
  const heads = layer.heads
    ? `, ${layer.heads} heads${layer.groups ? ` on ${layer.groups} key-value heads` : ""}`
    : "";
  const mlp = layer.experts
    ? `, ${layer.experts} experts`
    : layer.experts === 0
      ? ", dense MLP"
      : "";
  const name = title(layer);
  const absent = isAbsent(layer) ? "; not in this trace" : "";
  return `${name[0].toUpperCase()}${name.slice(1)}: ${sees}${heads}${mlp}${absent}`;
}
