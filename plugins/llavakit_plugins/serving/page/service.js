// The server's API: images as it takes them, answers in pieces, and heat maps.

const LARGEST = 4_000_000, EDGE = 2048;  // bytes of an image that is sent as it is; else its edge
export const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

const key = () => sessionStorage.getItem("key") ?? "";

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `The server answered with status ${response.status}.`);
  error.status = response.status;
  throw error;
}

export async function theModel() {
  return (await (await ask("v1/models")).json()).data[0];
}

export function toMessages(system, messages) {
  const told = system ? [{ role: "system", content: system }] : [];
  const unanswered = (n) => messages[n]?.role === "assistant" && !messages[n].text;
  for (const [n, { role, text, images }] of messages.entries()) {
    if (unanswered(n) || unanswered(n + 1)) continue;
    const shown = (images ?? []).map((url) => ({ type: "image_url", image_url: { url } }));
    const content = shown.length ? [...shown, { type: "text", text }] : text;
    told.push({ role, content });
  }
  return told;
}

function sampling(settings) {
  const chosen = {};
  for (const name of NUMBERS) if (settings[name] !== undefined) chosen[name] = settings[name];
  if (settings.stop) chosen.stop = settings.stop;
  return chosen;
}

// Calls `add` with each piece of the answer; returns why it ended and what it took.
export async function answer(messages, settings, signal, add) {
  const body = { messages, ...sampling(settings), stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", finish = null, usage = null, done = false;
  for (;;) {
    const { value, done: ended } = await reader.read();
    if (ended) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") { done = true; continue; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (choice?.delta?.content) add(choice.delta.content);
      finish = choice?.finish_reason ?? finish;
    }
  }
  if (!done) throw new Error("The connection broke while the answer came.");
  return { finish, usage };
}

export async function heatmap(messages, text) {
  return (await ask("v1/heatmaps", { messages, answer: text })).json();
}

// The image of a file as a data URL, as people see it: the server applies no EXIF orientation.
export async function dataUrl(file) {
  const plain = ["image/png", "image/jpeg", "image/webp", "image/gif"].includes(file.type);
  let blob = file;
  const bitmap = await createImageBitmap(file);  // turned upright; also shows whether it can be read
  if (!plain || file.size > LARGEST || setUpright(await file.arrayBuffer())) {
    const scale = Math.min(1, EDGE / Math.max(bitmap.width, bitmap.height));
    const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  }
  bitmap.close();
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// Sets the EXIF orientation of a JPEG, PNG or WebP to upright, in place; says whether it was another.
// EXIF is a TIFF directory, and bytes that only look like one hardly ever have this entry.
export function setUpright(buffer) {
  const bytes = new DataView(buffer), text = new TextDecoder("latin1").decode(buffer);
  const has = (at) => at + 12 <= buffer.byteLength;
  let turned = false;
  for (const { 0: order, index } of text.matchAll(/II\*\0|MM\0\*/g)) {
    const little = order[0] === "I";
    const first = has(index) ? index + bytes.getUint32(index + 4, little) : Infinity;
    const entries = has(first) ? bytes.getUint16(first, little) : 0;
    for (let n = 0, at = first + 2; n < entries && has(at); n++, at += 12) {
      if (bytes.getUint16(at, little) !== 0x0112 || bytes.getUint16(at + 8, little) <= 1) continue;
      bytes.setUint16(at + 8, 1, little);
      turned = true;
    }
  }
  return turned;
}
