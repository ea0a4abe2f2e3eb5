// The generated tokens as text, broken into lines here, so that of a long answer too only the lines on screen are there.

const TOKEN_LINE = 30, EDGES = 26;

class TokensView extends ChoiceView {
  constructor(trace, {choose}) {
    super(trace, {id: "tokens", item: "token", choose, follows: true});
    Object.assign(this, {lines: [], lineOf: []});
    if (!trace.tokens.length) this.scroller.append(element("p", {}, "Nothing was generated."));
  }

  rowOf(token) {
    return this.lineOf[token];
  }

  // A line ends after a line break, and before the word that no longer fits.
  layOut(width) {
    const room = width - EDGES;
    const measure = ruler(this.scroller), {tokens} = this.trace;
    const widths = tokens.map((text) => Math.max(7, measure(text.replaceAll("\n", "↵"))));
    this.lines = [];
    for (let begin = 0, end; begin < tokens.length; begin = end) {
      let used = 0, word = begin;
      for (end = begin; end < tokens.length; end++) {
        if (end > begin && tokens[end - 1].includes("\n")) break;
        if (/^\s/.test(tokens[end])) word = end;
        used += widths[end];
        if (used > room && end > begin) {
          end = word > begin ? word : end;
          break;
        }
      }
      this.lines.push([begin, end]);
    }
    this.lineOf = this.lines.flatMap(([begin, end], line) => Array(end - begin).fill(line));
    this.list.resize(this.lines.length, TOKEN_LINE);
  }

  row(index) {
    const [begin, end] = this.lines[index];
    const line = element("div", {class: "line", role: "presentation"});
    for (let token = begin; token < end; token++) line.append(this.token(token));
    return line;
  }

  token(index) {
    const {trace, shares, most} = this, share = shares[index], text = trace.tokens[index];
    const part = share > 0 ? Math.max(1, Math.round((5 * share) / most)) : 0;
    const token = element(
      "span",
      {
        class: `token s${step(share, most)}`, role: "option", id: `token-${index}`, "--part": `${part}px`,
        title: `Token ${index + 1}: ${percent(share)}`, "aria-selected": index === this.chosen,
        "aria-setsize": trace.tokens.length, "aria-posinset": index + 1,
        "aria-label": `Token ${index + 1}, ${tokenName(text)}, ${percent(share)}`,
      },
      ...shownToken(text),
    );
    token.dataset.index = index;
    return token;
  }

  pressed(event) {
    const count = this.trace.tokens.length;
    const sideways = {ArrowLeft: "ArrowUp", ArrowRight: "ArrowDown"}[event.key];
    const lines = {ArrowUp: -1, ArrowDown: 1, PageUp: -5, PageDown: 5}[event.key];
    let to;
    if (lines && this.chosen !== null) {
      // As far along the line above or below.
      const line = this.lineOf[this.chosen];
      const [begin, end] = this.lines[Math.max(0, Math.min(this.lines.length - 1, line + lines))];
      to = Math.min(end - 1, begin + this.chosen - this.lines[line][0]);
      event.preventDefault();
    } else {
      const key = {key: sideways ?? event.key, preventDefault: () => event.preventDefault()};
      to = stepped(key, this.chosen, 0, count, 1);
    }
    if (to !== undefined) this.choose(to);
  }
}
