// A list of which only the rows that are on screen are in the page. All rows are of one height but the open one, which
// is as high as what is in it.

const OVERSCAN = 4;

class VirtualList {
  // draw(index) makes a row; kept() gives the index of a row that is always there, or null; opened() that of the open
  // row, or null.
  constructor(scroller, {draw, kept = () => null, opened = () => null}) {
    Object.assign(this, {scroller, draw, kept, opened, count: 0, height: 1, extra: 0, rows: new Map()});
    this.holder = element("div", {class: "holder", role: "presentation"});
    scroller.append(this.holder);
    scroller.addEventListener("scroll", () => this.show(), {passive: true});
  }

  resize(count, height) {
    Object.assign(this, {count, height});
    this.holder.style.setProperty("--height", `${height}px`);
    this.refresh();
  }

  // Draw anew what is on screen.
  refresh() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
    this.extra = 0;
    const open = this.opened();
    if (open !== null) {
      this.put(open);
      this.extra = Math.max(0, this.rows.get(open).offsetHeight - this.height);
    }
    this.holder.style.height = `${this.count * this.height + this.extra}px`;
    this.show();
  }

  top(index) {
    const open = this.opened();
    return index * this.height + (open !== null && index > open ? this.extra : 0);
  }

  heightOf(index) {
    return this.height + (index === this.opened() ? this.extra : 0);
  }

  at(y) {
    const open = this.opened();
    const below = open === null ? y : y < this.top(open) + this.heightOf(open) ? Math.min(y, this.top(open)) : y - this.extra;
    return Math.max(0, Math.min(this.count - 1, Math.floor(below / this.height)));
  }

  // The first row on screen and the last.
  range() {
    const {scrollTop, clientHeight} = this.scroller;
    return [this.at(scrollTop), this.at(scrollTop + clientHeight - 1)];
  }

  show() {
    if (!this.count) return;
    const [first, last] = this.range();
    const begin = Math.max(0, first - OVERSCAN), end = Math.min(this.count - 1, last + OVERSCAN);
    const always = [this.kept(), this.opened()];
    for (const [index, row] of this.rows) {
      if ((index < begin || index > end) && !always.includes(index)) {
        row.remove();
        this.rows.delete(index);
      }
    }
    for (let index = begin; index <= end; index++) this.put(index);
    for (const index of always) if (index !== null && index < this.count) this.put(index);
  }

  put(index) {
    let row = this.rows.get(index);
    if (!row) {
      row = this.draw(index);
      this.rows.set(index, row);
      // In their order, as a screen reader reads them.
      const after = [...this.rows.keys()].filter((other) => other > index);
      this.holder.insertBefore(row, after.length ? this.rows.get(Math.min(...after)) : null);
    }
    row.style.top = `${this.top(index)}px`;
  }

  // Scroll so that a row is on screen: where it is not yet, a third from the top.
  reveal(index) {
    const top = this.top(index), bottom = top + this.heightOf(index), {scrollTop, clientHeight} = this.scroller;
    if (top < scrollTop || bottom > scrollTop + clientHeight) {
      this.scroller.scrollTop = top - (clientHeight - this.height) / 3;
    }
    this.show();
  }
}

// The steps that keys make through a list: the index from which and how many rows are on screen give the next one.
const STEPS = {
  ArrowDown: (at) => at + 1,
  ArrowUp: (at) => at - 1,
  PageDown: (at, page) => at + page,
  PageUp: (at, page) => at - page,
  Home: () => 0,
  End: () => Infinity,
};

// The row that a key leads to, or undefined for other keys. begin: where to begin if no row is chosen.
function stepped(event, chosen, begin, count, page) {
  const step = Object.hasOwn(STEPS, event.key) && !event.ctrlKey && !event.metaKey && !event.altKey && STEPS[event.key];
  if (!step || !count) return undefined;
  event.preventDefault();
  const to = chosen === null && event.key.startsWith("Arrow") ? begin : step(chosen ?? begin, page);
  return Math.max(0, Math.min(count - 1, to));
}

// How wide a text is, in the font of an element.
function ruler(from) {
  const context = document.createElement("canvas").getContext("2d");
  const style = getComputedStyle(from);
  context.font = `${style.fontSize} ${style.fontFamily}`;
  return (text) => context.measureText(text).width;
}
