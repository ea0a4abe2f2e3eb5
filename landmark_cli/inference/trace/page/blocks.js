// The text that was read, block by block.

const LINE = 22, PADDING = 15.5, MOST_LINES = 5;
// Browsers draw nothing that is higher than about 17 million pixels.
const MOST_PIXELS = 16e6;

class BlocksView extends ChoiceView {
  constructor(trace, {choose, matches}) {
    super(trace, {id: "blocks", item: "block", choose, opened: () => this.chosen});
    this.matches = matches;
  }

  // Rows as high as three blocks of four need.
  layOut(width) {
    const {blocks} = this.trace;
    const texts = blocks.map(oneLine), words = texts.slice(0, 50).join("") || "e";
    const narrow = matchMedia("(max-width: 62rem)").matches;
    const perLine = (width - (narrow ? 76 : 172)) / (ruler(this.scroller)(words) / words.length);
    const lengths = texts.map((text) => text.length).sort((a, b) => a - b);
    const needed = Math.ceil((lengths[Math.floor(0.75 * lengths.length)] ?? 1) / Math.max(8, perLine));
    const room = Math.floor((MOST_PIXELS / Math.max(1, blocks.length) - PADDING) / LINE);
    const lines = Math.max(1, Math.min(needed, MOST_LINES, room));
    this.list.holder.style.setProperty("--lines", lines);
    const top = this.list.range()[0];
    this.list.resize(blocks.length, lines * LINE + PADDING);
    this.scroller.scrollTop = this.list.top(top);
  }

  row(index) {
    const {trace, shares, most} = this;
    const share = shares[index], chosen = index === this.chosen;
    const [begin, end] = trace.place(index);
    const place = `tokens ${thousands(begin)} to ${thousands(end - 1)}${this.origin(begin, end)}`;
    const words = element("div", {class: "words"});
    words.append(...marked(trace.blocks[index], this.matches(index), !chosen));
    const read = element("div", {class: "share"});
    if (share > 0) read.append(percent(share), element("div", {class: "bar", "--part": `${(100 * share) / most}%`}));
    const row = element(
      "div",
      {
        class: `block s${step(share, most)}`, role: "option", id: `block-${index}`, title: chosen ? "" : place,
        "aria-setsize": trace.blocks.length, "aria-posinset": index + 1, "aria-selected": chosen,
        "aria-label": `Block ${index}, ${share > 0 ? `read ${percent(share)}` : "not read"}, ${place}: ${trace.blocks[index]}`,
      },
      element("div", {class: "number"}, thousands(index)), read, words,
    );
    row.dataset.index = index;
    if (chosen) row.append(element("div", {class: "place"}, place));
    return row;
  }

  // Where a block's text comes from, unless it is the prompt.
  origin(begin, end) {
    const {memory_tokens, prompt_tokens, landmark_freq} = this.trace;
    const prompt = memory_tokens + prompt_tokens, parts = [];
    if (begin < memory_tokens) parts.push(end > memory_tokens ? "begins in what was read earlier" : "read earlier");
    if (end > prompt) parts.push(begin < prompt ? "its end was generated" : "generated");
    if (end - begin < landmark_freq) parts.push("not complete, so it is not retrieved");
    return parts.length ? ` (${parts.join(", ")})` : "";
  }

  clicked(event) {
    const row = event.target.closest(".block");
    if (!row || !getSelection().isCollapsed) return;
    const index = Number(row.dataset.index);
    if (index !== this.chosen) this.choose(index);
    else if (!event.target.closest(".words")) this.choose(null);
  }

  pressed(event) {
    const [first, last] = this.list.range();
    const to = stepped(event, this.chosen, first, this.list.count, Math.max(1, last - first));
    if (to !== undefined) this.choose(to);
  }
}

function oneLine(text) {
  return text.replace(/\s*\n\s*/g, (between) => (between.split("\n").length > 2 ? " ¶ " : " "));
}

// A block's text as nodes, what was searched for in marks. matches: [begin, end, whether it is the current one] within
// the text. single: on one line.
function marked(text, matches, single) {
  const shown = single ? oneLine : (part) => part;
  const nodes = [];
  let at = 0;
  for (const [begin, end, current] of matches) {
    nodes.push(shown(text.slice(at, begin)));
    nodes.push(element("mark", current ? {class: "current"} : {}, shown(text.slice(begin, end))));
    at = end;
  }
  nodes.push(shown(text.slice(at)));
  return nodes;
}
