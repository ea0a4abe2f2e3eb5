// What is chosen, and what of it each part of the page shows.

const THEMES = ["system", "light", "dark"];
const MOST_READ = 5;

class Page {
  constructor(trace) {
    this.trace = trace;
    this.choice = {token: null, cell: null, block: null};
    this.search = new Search(trace, {changed: (block) => this.searched(block)});
    this.blocks = new BlocksView(trace, {
      choose: (block) => this.choose({block}, true),
      matches: (block) => this.search.inBlock(block),
    });
    this.overview = new Overview(this.blocks);
    this.tokens = new TokensView(trace, {choose: (token) => this.choose({token})});
    this.heads = new HeadsView(trace, {choose: (cell) => this.choose({cell})});
    byId("clear").addEventListener("click", () => this.choose({token: null, cell: null, block: null}));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target !== this.search.query) this.choose({token: null, cell: null, block: null});
    });
    this.theme();
    this.about();
    this.choose({});
  }

  // reveal: bring the chosen block on screen.
  choose(change, reveal = false) {
    const {trace} = this, {token, cell, block} = Object.assign(this.choice, change);
    const shares = trace.ofBlocks(token, cell);
    this.blocks.update(shares, block);
    if (reveal && block !== null) {
      // On a narrow screen the list may be below.
      this.blocks.scroller.scrollIntoView({block: "nearest"});
      this.blocks.list.reveal(block);
    }
    this.overview.update(this.search.blocks);
    this.tokens.update(trace.ofTokens(block, cell), token);
    const cells = trace.ofCells(token, block);
    this.heads.update(cells, cell);
    this.tell(shares, cells);
    this.mostRead(shares);
  }

  searched(block) {
    if (block === null) {
      this.blocks.list.refresh();
      return this.overview.update(this.search.blocks);
    }
    this.choose({block}, true);
    document.querySelector("mark.current")?.scrollIntoView({block: "nearest"});
  }

  tell(shares, cells) {
    const {trace, choice: {token, cell, block}} = this;
    const who = token === null ? "the whole answer" : `token ${token + 1}, ${tokenName(trace.tokens[token])}`;
    const where = cell === null ? "" : `, in ${trace.cellName(cell)}`;
    const total = shares.reduce((a, b) => a + b, 0);
    byId("shown").replaceChildren("Read by ", element("b", {}, who + where), `: ${percent(total)} of the attention went to blocks`);
    byId("clear").hidden = token === null && cell === null && block === null;
    const most = this.blocks.most;
    byId("legend").replaceChildren(
      "0", element("div", {}, ...Array.from({length: 9}, (_, at) => element("i", {class: `s${at}`}))), most ? percent(most) : "",
    );
    const asked = block === null ? "all blocks" : `block ${thousands(block)}`;
    byId("token").textContent = `The share that each token gave to ${asked}${where}.`;
    const one = cell === null ? "A row is a layer, a cell one of its heads." : `${capital(trace.cellName(cell))}: ${percent(cells[cell])}.`;
    byId("head").textContent = trace.cells
      ? `The share that each head gave to ${asked}. ${one}`
      : "No block was read: all of the text was still in view, or nothing was generated.";
  }

  mostRead(shares) {
    const order = Array.from(shares.keys()).filter((block) => shares[block] > 0).sort((a, b) => shares[b] - shares[a]);
    const rows = order.slice(0, MOST_READ).map((block) => {
      const button = element(
        "button", {type: "button", "aria-label": `Block ${block}, ${percent(shares[block])}: ${this.trace.blocks[block]}`},
        element("span", {class: "number"}, thousands(block)), element("span", {}, percent(shares[block])),
        element("span", {}, oneLine(this.trace.blocks[block])),
      );
      button.addEventListener("click", () => this.choose({block}, true));
      return element("li", {}, button);
    });
    byId("most").replaceChildren(...(rows.length ? rows : [element("li", {}, element("p", {}, "No block was read."))]));
  }

  about() {
    const {model, memory_tokens, prompt_tokens, landmark_freq, blocks, tokens, layers, heads} = this.trace;
    const parts = [
      model,
      `prompt of ${counted(prompt_tokens, "token")}`,
      ...(memory_tokens ? [`${counted(memory_tokens, "token")} read earlier`] : []),
      `${counted(blocks.length, "block")} of ${thousands(landmark_freq)}`,
      `${counted(tokens.length, "token")} generated`,
      `${counted(layers.length, "layer")} × ${counted(heads, "head")}`,
    ];
    byId("about").textContent = parts.join(" · ");
    document.title = `What did it read? ${model}`;
  }

  theme() {
    const button = byId("theme");
    let at = 0;
    const show = () => {
      document.documentElement.dataset.theme = THEMES[at];
      button.textContent = `Theme: ${THEMES[at]}`;
      this.overview.draw();
    };
    button.addEventListener("click", () => {
      at = (at + 1) % THEMES.length;
      show();
    });
    show();
  }
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

new Page(new Trace(JSON.parse(byId("trace").textContent)));
