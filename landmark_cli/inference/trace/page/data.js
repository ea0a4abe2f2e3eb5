"use strict";
// What the page was made of, and sums over it. A slot is one head of one layer at one generated token.

const TYPES = {u1: Uint8Array, u2: Uint16Array, u4: Uint32Array};
const WHOLE = 65535;

function unpacked({type, data}) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new TYPES[type](bytes.buffer);
}

class Trace {
  constructor(source) {
    Object.assign(this, source, source.reads);
    const counts = unpacked(this.counts);
    this.read = unpacked(source.reads.blocks);
    this.blocks = source.blocks;
    this.share = unpacked(this.shares);
    this.cells = this.layers.length * this.heads;
    // Slot s has read what stands from ends[s] to ends[s + 1].
    this.ends = new Uint32Array(counts.length + 1);
    for (let slot = 0; slot < counts.length; slot++) this.ends[slot + 1] = this.ends[slot] + counts[slot];
    this.textEnd = this.memory_tokens + this.prompt_tokens + Math.max(0, this.tokens.length - 1);
  }

  // Text tokens that a block holds, the first and the one after the last.
  place(block) {
    return [block * this.landmark_freq, Math.min((block + 1) * this.landmark_freq, this.textEnd)];
  }

  cellName(cell) {
    return `layer ${this.layers[Math.floor(cell / this.heads)]}, head ${cell % this.heads}`;
  }

  // Calls visit(token, cell, block, share) for all that was read at one token, or all of them, by one cell (a head of a
  // layer), or all of them. Shares are whole numbers, of WHOLE.
  visit(token, cell, visit) {
    const tokens = token === null ? [0, this.tokens.length] : [token, token + 1];
    const cells = cell === null ? [0, this.cells] : [cell, cell + 1];
    for (let t = tokens[0]; t < tokens[1]; t++) {
      for (let c = cells[0]; c < cells[1]; c++) {
        const slot = t * this.cells + c;
        for (let i = this.ends[slot]; i < this.ends[slot + 1]; i++) visit(t, c, this.read[i], this.share[i]);
      }
    }
  }

  // Each share is a part of the attention, on average over the slots that are asked for.

  ofBlocks(token, cell) {
    const sums = new Float64Array(this.blocks.length);
    this.visit(token, cell, (t, c, block, share) => { sums[block] += share; });
    return scaled(sums, (token === null ? this.tokens.length : 1) * (cell === null ? this.cells : 1));
  }

  ofTokens(block, cell) {
    const sums = new Float64Array(this.tokens.length);
    this.visit(null, cell, (t, c, b, share) => { if (block === null || b === block) sums[t] += share; });
    return scaled(sums, cell === null ? this.cells : 1);
  }

  ofCells(token, block) {
    const sums = new Float64Array(this.cells);
    this.visit(token, null, (t, c, b, share) => { if (block === null || b === block) sums[c] += share; });
    return scaled(sums, token === null ? this.tokens.length : 1);
  }
}

function scaled(sums, slots) {
  return sums.map((sum) => sum / WHOLE / (slots || 1));
}

// A share as a step of the colour ramp: 0 for nothing, else 1 to 8 by its square root, 8 for the most.
function step(share, most) {
  return share > 0 ? Math.min(8, 1 + Math.floor(8 * Math.sqrt(share / most))) : 0;
}

function percent(share) {
  if (share === 0) return "0%";
  if (share < 0.0001) return "<0.01%";
  return `${(100 * share).toFixed(share < 0.01 ? 2 : share < 0.1 ? 1 : 0)}%`;
}
