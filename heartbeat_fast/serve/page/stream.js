// The WebSocket: controls out, frames in, and the time between a change and its first picture.

const decoder = new TextDecoder();

export class Stream extends EventTarget {
  constructor(token) {
    super();
    this.token = token;
    this.revision = 0;
    this.sent = new Map(); // revision -> when it was sent, until it is seen
    this.wanted = {}; // every control that was set: told again after a reconnection
    this.wait = 500;
    this.connect();
  }

  connect() {
    const query = this.token ? `?token=${encodeURIComponent(this.token)}` : "";
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/v1/stream${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.wait = 500;
      this.say("link", "live");
      this.set(this.wanted);
    };
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.told(data) : this.shown(data));
    this.socket.onclose = ({ reason }) => {
      this.sent.clear();
      this.say("link", reason || "lost");
      setTimeout(() => this.connect(), this.wait);
      this.wait = Math.min(2 * this.wait, 8000);
    };
  }

  /** Changes controls; returns the revision that frames made from them will carry. */
  set(fields) {
    Object.assign(this.wanted, fields);
    if (this.socket.readyState !== WebSocket.OPEN || !Object.keys(fields).length) return this.revision;
    this.revision += 1;
    this.sent.set(this.revision, performance.now());
    this.socket.send(JSON.stringify({ ...fields, revision: this.revision }));
    return this.revision;
  }

  told(text) {
    const message = JSON.parse(text);
    if (message.kind === "error") this.say("refused", message.error);
  }

  shown(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length)));
    const count = header.height * header.width;
    const grey = new Uint8Array(buffer, 4 + length, count);
    const overlay = new Uint8Array(buffer, 4 + length + count, count);
    this.say("frame", { header, grey, overlay });
  }

  /** Says that a frame is on the screen; gives the milliseconds since its change, the first time. */
  seen({ number, revision }) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ seen: number }));
    let latency = null;
    for (const [mine, at] of this.sent) {
      if (mine > revision) continue;
      if (mine === revision) latency = performance.now() - at;
      this.sent.delete(mine);
    }
    return latency;
  }

  say(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

/** Bytes as base64, in pieces that fit an argument list. */
export function base64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}
