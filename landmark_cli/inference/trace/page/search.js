// Search through all of the text, whose most part is not in the page for the browser's own search to find.

class Search {
  // changed: called when there are other matches or another current one.
  constructor(trace, {changed}) {
    this.changed = changed;
    this.text = trace.blocks.join("");
    // Block b stands from starts[b] to starts[b + 1].
    this.starts = new Uint32Array(trace.blocks.length + 1);
    trace.blocks.forEach((block, at) => { this.starts[at + 1] = this.starts[at] + block.length; });
    this.clear();
    this.query = byId("query");
    this.query.addEventListener("input", () => this.find(this.query.value));
    this.query.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.shiftKey) {
        event.preventDefault();
        this.go(-1);
      }
    });
    byId("search").addEventListener("submit", (event) => {
      event.preventDefault();
      this.go(1);
    });
    byId("previous").addEventListener("click", () => this.go(-1));
    document.addEventListener("keydown", (event) => {
      // The second time it is the browser's.
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "f" && document.activeElement !== this.query) {
        event.preventDefault();
        this.query.focus();
        this.query.select();
      }
    });
  }

  clear() {
    Object.assign(this, {begins: [], ends: [], blocks: [], current: null});
  }

  find(words) {
    this.clear();
    if (words) {
      // A space stands for a line break too.
      const pattern = new RegExp(words.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&").replace(/\s+/g, "\\s+"), "giu");
      for (const match of this.text.matchAll(pattern)) {
        this.begins.push(match.index);
        this.ends.push(match.index + match[0].length);
      }
    }
    this.blocks = [...new Set(this.begins.map((begin) => this.blockAt(begin)))];
    this.tell();
    this.changed(null);
  }

  // To the next match, or the one before.
  go(by) {
    const count = this.begins.length;
    if (!count) return;
    this.current = this.current === null ? (by > 0 ? 0 : count - 1) : (this.current + by + count) % count;
    this.tell();
    this.changed(this.blockAt(this.begins[this.current]));
  }

  tell() {
    const count = this.begins.length;
    const none = this.query.value ? "not found" : "";
    const at = this.current === null ? "" : `${thousands(this.current + 1)} of `;
    byId("found").textContent = count ? `${at}${thousands(count)} found` : none;
  }

  blockAt(place) {
    return after(this.starts, place) - 1;
  }

  // The matches in a block, as `marked` takes them; one that goes on in the next block is marked in both.
  inBlock(block) {
    const {starts, begins, ends} = this, start = starts[block], end = starts[block + 1];
    const found = [];
    for (let at = after(ends, start); at < begins.length && begins[at] < end; at++) {
      found.push([Math.max(0, begins[at] - start), Math.min(end, ends[at]) - start, at === this.current]);
    }
    return found;
  }
}

// How many of the sorted numbers are at most `value`.
function after(numbers, value) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}
