// The server's API: answers in pieces, and heat maps.

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

// Calls `add` with each piece of the answer; returns why it ended and what it took.
export async function answer(messages, settings, signal, add) {
  const body = { messages, ...settings, stream: true, stream_options: { include_usage: true } };
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
