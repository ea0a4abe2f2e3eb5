// A part of the page whose items are read more or less, and of which one can be chosen, by a click or by keys: blocks,
// tokens, heads. A class of its own says what a row of the list shows (row), which row an item is in (rowOf), how the rows
// are laid out on a width (layOut), and where keys lead (pressed).

class ChoiceView {
  // id: of the element that scrolls. item: the class of items' elements, whose ids are `${item}-${index}`. choose(index)
  // chooses one, or none for null. follows: whether the chosen one is brought on screen. opened: as of VirtualList.
  constructor(trace, {id, item, choose, follows = false, opened}) {
    Object.assign(this, {trace, item, choose, follows, shares: new Float64Array(0), most: 0, chosen: null});
    this.scroller = byId(id);
    const kept = () => (this.chosen === null ? null : this.rowOf(this.chosen) ?? null);
    this.list = new VirtualList(this.scroller, {draw: (index) => this.row(index), kept, opened});
    this.scroller.addEventListener("click", (event) => this.clicked(event));
    this.scroller.addEventListener("keydown", (event) => this.pressed(event));
    new ResizeObserver(() => this.fit()).observe(this.scroller);
  }

  rowOf(index) {
    return index;
  }

  fit() {
    const width = this.scroller.clientWidth;
    if (width === this.width || !width) return this.list.show();
    this.width = width;
    this.layOut(width);
  }

  // shares of all items; chosen: the index of one of them, or null.
  update(shares, chosen) {
    Object.assign(this, {shares, chosen, most: shares.reduce((a, b) => Math.max(a, b), 0)});
    if (chosen === null) this.scroller.removeAttribute("aria-activedescendant");
    else this.scroller.setAttribute("aria-activedescendant", `${this.item}-${chosen}`);
    this.list.refresh();
    if (this.follows && chosen !== null) this.list.reveal(this.rowOf(chosen));
  }

  // What is chosen is let go by a second click.
  clicked(event) {
    const found = event.target.closest(`.${this.item}`);
    if (!found) return;
    const index = Number(found.dataset.index);
    this.choose(index === this.chosen ? null : index);
  }
}
