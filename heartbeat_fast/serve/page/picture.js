// The canvas: grey frame, coloured labels and valve on it. Colours are Okabe and Ito's.

const COLOURS = [null, [213, 94, 0], [0, 158, 115], [86, 180, 233]];
const VALVE = [255, 214, 70];
const FILL = 46; // opacity of labels, of 255
const EDGE = 210; // and of their outlines

export class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.size = 0;
    this.overlayShown = true;
    this.shift = [0, 0]; // of the valve while it is dragged
    this.cursor = null; // {x, y, radius} of the brush
    new ResizeObserver(() => this.fit()).observe(canvas);
  }

  fit() {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio);
    if (!side || side === this.canvas.width) return;
    this.canvas.width = this.canvas.height = side;
    this.draw();
  }

  /** Shows a frame: grey (H·W), labels (H·W, 0-3) and valve (H·W, 0-63). */
  show(size, grey, labels, valve) {
    if (size !== this.size) {
      this.size = size;
      this.base = layer(size);
      this.marks = layer(size);
    }
    Object.assign(this, { grey, labels, valve });
    this.draw();
  }

  draw() {
    if (!this.size) return;
    const { context, canvas } = this;
    this.paintBase();
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.base.canvas, 0, 0, canvas.width, canvas.height);
    if (this.overlayShown) {
      this.paintMarks();
      context.drawImage(this.marks.canvas, 0, 0, canvas.width, canvas.height);
    }
    if (this.cursor) this.paintCursor();
  }

  paintBase() {
    const { data } = this.base.image;
    for (let i = 0, k = 0; i < this.grey.length; i += 1, k += 4) {
      data[k] = data[k + 1] = data[k + 2] = this.grey[i];
      data[k + 3] = 255;
    }
    this.base.context.putImageData(this.base.image, 0, 0);
  }

  paintMarks() {
    const { size, labels, valve } = this;
    const { data } = this.marks.image;
    const [dx, dy] = this.shift.map(Math.round);
    for (let y = 0, i = 0; y < size; y += 1) {
      for (let x = 0; x < size; x += 1, i += 1) {
        const label = labels[i];
        const edge = label && (labels[i - 1] !== label || labels[i + 1] !== label
          || labels[i - size] !== label || labels[i + size] !== label);
        let colour = COLOURS[label];
        let alpha = !label ? 0 : edge ? EDGE : FILL;
        const u = x - dx;
        const v = y - dy;
        const line = u >= 0 && v >= 0 && u < size && v < size ? valve[v * size + u] : 0;
        if (line > 20) {
          colour = VALVE;
          alpha = Math.max(alpha, 3 * line);
        }
        const k = 4 * i;
        if (colour) [data[k], data[k + 1], data[k + 2]] = colour;
        data[k + 3] = colour ? alpha : 0;
      }
    }
    this.marks.context.putImageData(this.marks.image, 0, 0);
  }

  paintCursor() {
    const scale = this.canvas.width / this.size;
    const { x, y, radius } = this.cursor;
    this.context.beginPath();
    this.context.arc(x * scale, y * scale, radius * scale, 0, 2 * Math.PI);
    this.context.lineWidth = Math.max(1, scale / 3);
    this.context.strokeStyle = "rgb(255 255 255 / 70%)";
    this.context.stroke();
  }

  /** Where a pointer event lies, in the frame's pixels. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.size / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }
}

function layer(size) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  return { canvas, context, image: context.createImageData(size, size) };
}
