// A grid of cells on a canvas, one stop for Tab. What draw() is given: rows, columns, width and
// height of a cell, paint(context, row, column, x, y, w, h), tell(row, column), at() and
// move(row, column) for the chosen cell, rowName(row), columnName(column), and for `margin` pixels
// at the right aside(context, row, x, y, h).

class Grid {
  constructor(label) {
    this.canvas = make("canvas", { tabIndex: 0, role: "application" });
    this.canvas.setAttribute("aria-roledescription", "heat map");
    this.canvas.setAttribute("aria-label", label);
    this.names = make("div", { className: "rows", "aria-hidden": "true" });
    this.element = make(
      "div",
      { className: "scroll" },
      make("div", { className: "grid" }, this.names, this.canvas),
    );
    this.canvas.onpointermove = (event) => {
      const cell = this.cellAt(event);
      this.canvas.style.cursor = cell ? "crosshair" : "default";
      if (cell) tell(this.spec.tell(...cell), () => this.box(...cell), false);
      else hush();
    };
    this.canvas.onpointerleave = hush;
    this.canvas.onclick = (event) => {
      const cell = this.cellAt(event);
      if (cell) this.go(cell);
    };
    this.canvas.onkeydown = (event) => {
      const cell = step(event, this.spec.at(), this.spec.rows, this.spec.columns);
      if (cell) this.go(cell);
    };
    this.canvas.onfocus = () => {
      if (this.canvas.matches(":focus-visible")) this.read();
    };
    this.canvas.onblur = hush;
  }
  go(cell) {
    this.spec.move(...cell);
    this.reveal();
    this.read();
  }
  read() {
    const cell = this.spec.at();
    tell(this.spec.tell(...cell), () => this.box(...cell), true);
  }
  reveal() {
    // the column, where the grid is wider than the page
    const [, column] = this.spec.at(),
      { width } = this.spec,
      host = this.element;
    const left = column * width,
      shown = host.clientWidth - this.names.offsetWidth;
    if (left < host.scrollLeft) host.scrollLeft = left - width;
    else if (left + 2 * width > host.scrollLeft + shown) host.scrollLeft = left + 2 * width - shown;
  }
  box(row, column) {
    const { left, top } = this.canvas.getBoundingClientRect(),
      { width, height } = this.spec;
    return {
      left: left + column * width,
      top: top + row * height,
      bottom: top + (row + 1) * height,
    };
  }
  cellAt(event) {
    const { left, top } = this.canvas.getBoundingClientRect(),
      { width, height, rows, columns } = this.spec;
    const column = Math.floor((event.clientX - left) / width),
      row = Math.floor((event.clientY - top) / height);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  }
  draw(spec) {
    this.spec = spec;
    const { rows, columns, width, height, margin = 0 } = spec,
      hasNames = width >= 10;
    const ratio = devicePixelRatio || 1,
      [w, h] = [columns * width + margin + 1, rows * height + (hasNames ? 80 : 1)];
    Object.assign(this.canvas, { width: w * ratio, height: h * ratio });
    Object.assign(this.canvas.style, { width: `${w}px`, height: `${h}px` });
    const context = this.canvas.getContext("2d"),
      gap = Math.min(width, height) >= 8 ? 1 : 0;
    context.scale(ratio, ratio);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        context.globalAlpha = 1;
        spec.paint(context, row, column, column * width, row * height, width - gap, height - gap);
      }
      context.globalAlpha = 1;
      spec.aside?.(context, row, columns * width + 8, row * height, height - gap);
    }
    context.globalAlpha = 1;
    const [row, column] = spec.at();
    for (let n = 0; hasNames && n < columns; n++) {
      context.save();
      context.translate(n * width + width / 2, rows * height + 5);
      context.rotate(Math.PI / 2);
      const size = Math.min(11, width - 1);
      context.font = `${n === column ? "bold " : ""}${size}px ui-monospace, monospace`;
      context.fillStyle = colour(n === column ? "ink" : "muted");
      context.textBaseline = "middle";
      context.fillText(clipped(spec.columnName(n), 10), 0, 0);
      context.restore();
    }
    context.strokeStyle = colour("ink");
    context.lineWidth = 2;
    context.strokeRect(column * width, row * height, width - gap, height - gap);
    const every = Math.ceil(11 / height); // rows to a name, so that names do not overlap
    this.names.replaceChildren(
      ...Array.from({ length: Math.ceil(rows / every) }, (_, n) => {
        const isNow = Math.floor(row / every) === n;
        const name = make(
          "div",
          { className: isNow ? "now" : "" },
          spec.rowName(isNow ? row : n * every),
        );
        name.style.height = `${every * height}px`;
        return name;
      }),
    );
  }
}
function clipped(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}
function room(host, gutter) {
  return Math.max(200, host.clientWidth - gutter);
}
