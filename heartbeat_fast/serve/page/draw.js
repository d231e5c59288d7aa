// Tools on the picture: a brush for each label, and a hand for the mitral valve.

import { base64 } from "./stream.js";

const EVERY = 150; // milliseconds between two positions of a dragged valve on their way out

export class Tools {
  /** hooks: freeze(), thaw(revision), frame(), send(fields) -> revision, farthest() */
  constructor(picture, hooks) {
    Object.assign(this, { picture, hooks, tool: null, radius: 9, carry: "motion" });
    this.drag = null;
    this.valve = [0, 0]; // how far the valve is dragged in all
    this.painted = null; // {frame, labels}
    const { canvas } = picture;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => this.hover(null));
  }

  choose(tool) {
    this.tool = tool === this.tool ? null : tool;
    const list = this.picture.canvas.classList;
    list.toggle("drawing", this.brushing);
    list.toggle("dragging", this.tool === "valve");
    this.hover(null);
  }

  get brushing() {
    return this.tool !== null && this.tool !== "valve";
  }

  down(event) {
    if (this.tool === null || !this.picture.size) return;
    this.picture.canvas.setPointerCapture(event.pointerId);
    this.hooks.freeze();
    const at = this.picture.at(event);
    this.drag = { from: at, last: at, sent: 0, start: this.valve };
    if (this.brushing) {
      this.picture.labels = this.picture.labels.slice();
      this.stroke(at, at);
    }
  }

  move(event) {
    const at = this.picture.size ? this.picture.at(event) : null;
    if (this.brushing) this.hover(at);
    if (!this.drag) return;
    if (this.brushing) this.stroke(this.drag.last, at);
    else this.pull(at);
    this.drag.last = at;
  }

  up(event) {
    if (!this.drag) return;
    let revision;
    if (this.brushing) {
      this.painted = { frame: this.hooks.frame(), labels: this.picture.labels };
      revision = this.send();
    } else {
      this.pull(this.picture.at(event));
      revision = this.hooks.send({ valve: this.valve });
    }
    this.drag = null;
    this.hooks.thaw(revision);
  }

  send() {
    const { frame, labels } = this.painted;
    return this.hooks.send({ paint: { frame, labels: base64(labels), carry: this.carry } });
  }

  hover(at) {
    this.picture.cursor = at && { x: at[0], y: at[1], radius: this.radius };
    this.picture.draw();
  }

  /** Paints along a line, a disc every pixel. */
  stroke([x0, y0], [x1, y1]) {
    const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0)));
    for (let k = 0; k <= steps; k += 1) this.disc(x0 + ((x1 - x0) * k) / steps, y0 + ((y1 - y0) * k) / steps);
    this.picture.draw();
  }

  disc(cx, cy) {
    const { size, labels } = this.picture;
    const r = this.radius;
    const label = Number(this.tool);
    for (let y = Math.max(0, Math.ceil(cy - r)); y <= Math.min(size - 1, cy + r); y += 1) {
      for (let x = Math.max(0, Math.ceil(cx - r)); x <= Math.min(size - 1, cx + r); x += 1) {
        if ((x - cx) ** 2 + (y - cy) ** 2 <= r * r) labels[y * size + x] = label;
      }
    }
  }

  pull([x, y]) {
    const most = this.hooks.farthest();
    const clamp = (value) => Math.min(most, Math.max(-most, value));
    const { from, start } = this.drag;
    this.valve = [clamp(start[0] + x - from[0]), clamp(start[1] + y - from[1])];
    this.picture.shift = [this.valve[0] - start[0], this.valve[1] - start[1]];
    this.picture.draw();
    if (performance.now() - this.drag.sent > EVERY) {
      this.drag.sent = performance.now();
      this.hooks.send({ valve: this.valve });
    }
  }

  reset() {
    this.painted = null;
    this.valve = [0, 0];
    this.picture.shift = [0, 0];
    return this.hooks.send({ paint: null, valve: [0, 0] });
  }
}
