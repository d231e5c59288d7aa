// Wires the page: sliders and tools to the stream, frames to the picture, numbers to the footer.

import { Tools } from "./draw.js";
import { Picture } from "./picture.js";
import { Stream, base64 } from "./stream.js";

const $ = (id) => document.getElementById(id);
const NAMES = {
  text: "Prompt", ef: "EF", image: "Image prior", sketch: "Sketch", mask: "Mask",
  skeleton: "Valve", flow: "Flow",
};
const HINTS = {
  null: "",
  valve: "Drag the mitral valve; its surroundings follow.",
  brush: "Paint on this frame; the other frames follow when you let go.",
};

const token = new URLSearchParams(location.hash.slice(1)).get("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};
const answer = await fetch("/v1/info", { headers });
const info = await answer.json();
if (!answer.ok) fail(info.error);

const use = new Set(["text", "ef", "mask", "skeleton", "flow"]);
const state = { playing: true, frozen: false, until: null, frames: [], shown: 0, heart: 7 };
const picture = new Picture($("picture"));
const stream = new Stream(token);
const tools = new Tools(picture, {
  freeze: () => { state.frozen = true; },
  thaw: (revision) => { state.until = revision; },
  frame: () => state.shown,
  farthest: () => info.farthest_valve,
  send: (fields) => {
    $("reset").disabled = false;
    return stream.set(fields);
  },
});

// Frames ------------------------------------------------------------------------------------------

let newest = null; // the frame that came last: drawn when the screen is ready for it

stream.addEventListener("frame", ({ detail }) => {
  if (newest === null) requestAnimationFrame(draw);
  newest = detail;
  state.frames[detail.header.frame] = detail;
});

function draw() {
  const { header } = newest;
  newest = null;
  if (state.until !== null && header.revision >= state.until) release();
  if (state.playing && !state.frozen) show(header.frame);
  report(header, stream.seen(header));
}

function split(overlay) {
  const labels = new Uint8Array(overlay.length);
  const valve = new Uint8Array(overlay.length);
  for (let i = 0; i < overlay.length; i += 1) {
    labels[i] = overlay[i] & 3;
    valve[i] = overlay[i] >> 2;
  }
  return { labels, valve };
}

function show(k) {
  const frame = state.frames[k];
  if (!frame) return;
  state.shown = k;
  const { labels, valve } = split(frame.overlay);
  picture.show(frame.header.width, frame.grey, labels, valve);
  $("phase").max = frame.header.frames - 1;
  $("phase").value = k;
  $("phase-of").value = `${k + 1} / ${frame.header.frames}`;
}

/** What was drawn has come back as a clip: the picture moves on. */
function release() {
  state.until = null;
  state.frozen = false;
  picture.shift = [0, 0];
}

// Numbers -----------------------------------------------------------------------------------------

const rate = { since: performance.now(), count: 0 };

function duration(ms) {
  return ms < 2000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function report(header, latency) {
  if (latency !== null) $("latency").textContent = duration(latency);
  $("making").hidden = !header.making;
  rate.count += 1;
  const passed = performance.now() - rate.since;
  if (passed > 1000) {
    $("rate").textContent = `${((1000 * rate.count) / passed).toFixed(0)} / s`;
    $("age").textContent = duration(Math.max(0, Date.now() - 1000 * header.time));
    Object.assign(rate, { since: performance.now(), count: 0 });
  }
  $("dropped").textContent = header.dropped;
  $("clips").textContent = header.clips;
  $("made-steps").textContent = `${header.steps} × ${header.sampler}`;
  $("engine").textContent = `${header.engine}, ${header.precision}`;
  $("bundle").textContent = header.bundle;
  $("scale").textContent = `${header.spacing_mm[0].toFixed(2)} mm / px`;
  if (header.fault) fail(header.fault);
}

stream.addEventListener("refused", ({ detail }) => {
  fail(detail);
  release();
});
stream.addEventListener("link", ({ detail }) => {
  $("link").className = `link ${detail === "live" ? "live" : "lost"}`;
  $("link").textContent = detail === "live" ? "live" : `${detail}; trying again`;
  $("making").hidden = detail !== "live";
  if (detail !== "live") release();
});

let quiet;
function fail(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = false;
  clearTimeout(quiet);
  quiet = setTimeout(() => { $("error").hidden = true; }, 8000);
}

// Controls ----------------------------------------------------------------------------------------

const units = { ef: " %", heart_rate: " / min", brush: " px" };
for (const name of ["ef", "heart_rate"]) {
  $(name).addEventListener("input", () => {
    $(`${name}-of`).value = $(name).value + units[name];
    stream.set({ [name]: Number($(name).value) });
  });
}
$("brush").addEventListener("input", () => {
  tools.radius = Number($("brush").value);
  $("brush-of").value = `${tools.radius} px`;
});

function press(group, chosen) {
  for (const button of document.querySelectorAll(`[data-${group}]`)) {
    button.setAttribute("aria-pressed", String(button.dataset[group] === chosen));
  }
}
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => {
    press("view", button.dataset.view);
    clear();
    stream.set({ view: button.dataset.view });
  });
}
for (const button of document.querySelectorAll("[data-carry]")) {
  button.addEventListener("click", () => {
    press("carry", button.dataset.carry);
    tools.carry = button.dataset.carry;
    if (tools.painted) tools.send();
  });
}
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => pick(button.dataset.tool));
}

function pick(tool) {
  tools.choose(tool);
  press("tool", tools.tool);
  $("hint").textContent = tools.brushing ? HINTS.brush : HINTS[tools.tool];
}

function clear() {
  tools.reset();
  release();
  $("reset").disabled = true;
}
$("reset").addEventListener("click", clear);
$("another").addEventListener("click", () => {
  state.heart += 1;
  clear();
  stream.set({ heart: state.heart });
});
$("seed").addEventListener("change", () => stream.set({ seed: Math.max(0, Math.trunc(Number($("seed").value))) }));
$("overlay").addEventListener("change", () => {
  picture.overlayShown = $("overlay").checked;
  picture.draw();
});

function play(playing) {
  state.playing = playing;
  $("play").textContent = playing ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(playing));
}
$("play").addEventListener("click", () => play(!state.playing));
$("phase").addEventListener("input", () => {
  play(false);
  show(Number($("phase").value));
});
addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=range]):not([type=checkbox]), select") || event.ctrlKey || event.metaKey) return;
  if (event.code === "Space" && !event.target.matches("button")) {
    event.preventDefault();
    play(!state.playing);
  } else if ("0123".includes(event.key)) pick(event.key);
  else if (event.key === "v") pick("valve");
});

// Conditions and sampling -------------------------------------------------------------------------

let image = null;
for (const name of info.conditions) {
  const label = document.createElement("label");
  const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: use.has(name) });
  box.disabled = name === "image" || name === "sketch"; // until there is an image
  box.dataset.use = name;
  box.addEventListener("change", () => {
    use[box.checked ? "add" : "delete"](name);
    stream.set({ use: [...use] });
  });
  label.append(box, NAMES[name]);
  $("uses").append(label);
}

function take(grey) {
  image = grey;
  for (const name of ["image", "sketch"]) document.querySelector(`[data-use=${name}]`).disabled = false;
  document.querySelector("[data-use=image]").checked = true;
  use.add("image");
  stream.set({ image: base64(image), use: [...use] });
}
$("as-image").addEventListener("click", () => state.frames[state.shown] && take(state.frames[state.shown].grey));
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  $("file").value = "";
  try {
    take(await greyOf(file, info.size));
  } catch {
    fail(`${file?.name}: not a picture that this browser can open`);
  }
});

/** A picture in grey, centred on a black square of the model's size. */
async function greyOf(file, size) {
  const bitmap = await createImageBitmap(file);
  const canvas = Object.assign(document.createElement("canvas"), { width: size, height: size });
  const context = canvas.getContext("2d");
  const scale = size / Math.max(bitmap.width, bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (size - w) / 2, (size - h) / 2, w, h);
  const { data } = context.getImageData(0, 0, size, size);
  return Uint8Array.from({ length: size * size }, (_, i) => data[4 * i] * 0.299 + data[4 * i + 1] * 0.587 + data[4 * i + 2] * 0.114);
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, value === chosen, value === chosen)));
}
options($("sampler"), Object.keys(info.samplers), info.start.sampler);
options($("steps"), info.samplers[info.start.sampler], info.start.steps);
$("sampler").addEventListener("change", () => {
  const counts = info.samplers[$("sampler").value];
  const steps = Number($("steps").value);
  options($("steps"), counts, counts.includes(steps) ? steps : counts.at(-1));
  stream.set({ sampler: $("sampler").value, steps: Number($("steps").value) });
});
$("steps").addEventListener("change", () => stream.set({ steps: Number($("steps").value) }));
