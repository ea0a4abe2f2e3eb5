// All blocks in one strip, as high as the list beside it: what was read most in each line of pixels, what was found, and
// what of it is on screen.

class Overview {
  constructor(blocks) {
    this.blocks = blocks;
    this.frame = byId("overview");
    this.canvas = this.frame.querySelector("canvas");
    this.window = this.frame.querySelector("div");
    this.found = [];
    blocks.scroller.addEventListener("scroll", () => this.move(), {passive: true});
    new ResizeObserver(() => this.draw()).observe(this.frame);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.frame.addEventListener("pointerdown", (event) => {
      this.frame.setPointerCapture(event.pointerId);
      this.go(event);
    });
    this.frame.addEventListener("pointermove", (event) => { if (event.buttons & 1) this.go(event); });
  }

  // found: blocks with a match of what is searched for.
  update(found) {
    this.found = found;
    this.draw();
  }

  draw() {
    const {canvas, blocks: {shares, most}} = this, ratio = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (!width || !height) return;
    Object.assign(canvas, {width, height});
    const context = canvas.getContext("2d"), style = getComputedStyle(canvas);
    // A block is at least two pixels high, so that one of many thousands is seen.
    const thick = Math.max(2 * ratio, height / Math.max(1, shares.length));
    const y = (block) => Math.min(height - thick, (block * height) / shares.length);
    const longest = new Map();
    shares.forEach((share, block) => {
      const line = Math.floor(y(block));
      if (share > (longest.get(line) ?? 0)) longest.set(line, share);
    });
    context.fillStyle = style.color;
    for (const [line, share] of longest) context.fillRect(0, line, Math.max(2 * ratio, (width * share) / most), thick);
    context.fillStyle = style.outlineColor;
    for (const block of this.found) context.fillRect(width - 8 * ratio, y(block), 8 * ratio, thick);
    this.move();
  }

  move() {
    const {scrollTop, clientHeight, scrollHeight} = this.blocks.scroller, height = this.canvas.clientHeight;
    this.window.style.top = `${(height * scrollTop) / scrollHeight}px`;
    this.window.style.height = `${Math.min(height, (height * clientHeight) / scrollHeight)}px`;
  }

  go(event) {
    const {scroller} = this.blocks, frame = this.canvas.getBoundingClientRect();
    const part = (event.clientY - frame.top) / frame.height;
    scroller.scrollTop = part * scroller.scrollHeight - scroller.clientHeight / 2;
  }
}
