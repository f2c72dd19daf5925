// Drawn again when the colours or the width change

function redraw() {
  for (const name of Object.keys(palette)) delete palette[name];
  choose({});
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let width = 0;
new ResizeObserver(() => {
  if (width !== document.body.clientWidth) redraw();
  width = document.body.clientWidth;
}).observe(document.body);
redraw();
