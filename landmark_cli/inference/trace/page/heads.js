// What each head read: a row for each layer, a cell for each head.

const LAYER = 18, NAMES = 39;

class HeadsView extends ChoiceView {
  constructor(trace, {choose}) {
    super(trace, {id: "heads", item: "cell", choose, follows: true});
    this.scroller.setAttribute("aria-rowcount", trace.layers.length);
    this.scroller.setAttribute("aria-colcount", trace.heads);
    this.axis = element("div", {class: "axis", "aria-hidden": "true"});
    this.scroller.prepend(this.axis);
    if (!trace.cells) this.scroller.hidden = true;
  }

  rowOf(cell) {
    return Math.floor(cell / this.trace.heads);
  }

  layOut(width) {
    const {layers, heads} = this.trace;
    this.cellWidth = Math.max(9, Math.min(34, Math.floor((width - NAMES) / heads)));
    this.scroller.style.setProperty("--width", `${this.cellWidth}px`);
    this.list.holder.style.width = `${NAMES + heads * this.cellWidth}px`;
    // A number is as wide as two cells at least where they are narrow.
    const every = this.cellWidth < 16 ? 4 : this.cellWidth < 24 ? 2 : 1;
    this.axis.replaceChildren(
      ...Array.from({length: heads}, (_, head) => element("span", {}, head % every ? "" : String(head))),
    );
    this.list.resize(layers.length, LAYER);
  }

  row(index) {
    const {trace, shares, most} = this;
    const name = trace.layers[index];
    const row = element(
      "div", {class: "layer", role: "row", "aria-rowindex": index + 1},
      element("span", {class: "name", role: "rowheader", title: `Layer ${name}`, "aria-label": `Layer ${name}`}, String(name)),
    );
    for (let head = 0; head < trace.heads; head++) {
      const cell = index * trace.heads + head, share = shares[cell];
      const drawn = element(
        "span",
        {
          class: `cell s${step(share, most)}`, role: "gridcell", id: `cell-${cell}`, "aria-colindex": head + 1,
          "aria-selected": cell === this.chosen, title: `Layer ${name}, head ${head}: ${percent(share)}`,
          "aria-label": `Layer ${name}, head ${head}: ${percent(share)}`,
        },
        element("i", {"--part": `${most ? (100 * share) / most : 0}%`}),
      );
      drawn.dataset.index = cell;
      row.append(drawn);
    }
    return row;
  }

  pressed(event) {
    const {heads, layers, cells} = this.trace;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      if (this.chosen === null) return this.choose(0);
      const to = this.chosen + (event.key === "ArrowLeft" ? -1 : 1);
      if (to >= 0 && to < cells) this.choose(to);
      return;
    }
    const layer = this.chosen === null ? null : this.rowOf(this.chosen);
    const to = stepped(event, layer, 0, layers.length, 8);
    if (to !== undefined) this.choose(to * heads + (this.chosen ?? 0) % heads);
  }
}
