// The page: dialogues, the composer, and what the model answers, shown as text and never as HTML.

import { allDialogues, forget, keep } from "./store.js";
import { answer, heatmap, theModel, toMessages } from "./service.js";
import { show as showHeat } from "./heat.js";

const find = (selector) => document.querySelector(selector);
const log = find("#log"), input = find("#ask"), status = find("#status");
const parameters = find("#parameters"), nav = find("#dialogues");
const LARGEST = 4_000_000, EDGE = 2048;  // bytes of an image that is sent as it is; else its edge

let model = null;
let dialogue = fresh();
let pictures = [];  // data URLs, to be sent with the next question
let edited = null;  // which message is being edited
let running = null;  // aborts the answer that comes

function fresh() {
  const settings = JSON.parse(localStorage.getItem("settings") ?? "{}");
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", changed: 0, settings, messages: [] };
}

function element(name, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

// -- the conversation

function render() {
  if (!dialogue.messages.length) {
    log.replaceChildren(element("p", { class: "welcome", text: "Drop, paste or add an image, and ask about it." }));
  } else {
    log.replaceChildren(...dialogue.messages.map(renderMessage));
  }
  log.scrollTop = log.scrollHeight;
}

function renderMessage(message, index) {
  const last = index === dialogue.messages.length - 1;
  const whole = element("article", {
    class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Model",
  });
  if (message.images?.length) {
    const shown = message.images.map((src, n) => element("img", { src, alt: `Image ${n + 1}` }));
    whole.append(element("div", { class: "images" }, ...shown));
  }
  if (message.text) whole.append(element("div", { class: "text", text: message.text }));
  if (message.wrong) whole.append(element("div", { class: "wrong", role: "alert", text: message.wrong }));
  const tools = element("div", { class: "tools" });
  const tool = (text, act) => tools.append(element("button", { type: "button", text, onclick: act }));
  if (message.role === "user") {
    tool("Edit", () => edit(index));
  } else if (!(last && running)) {
    if (message.text) tool("Copy", () => copy(message.text));
    if (last) tool("Regenerate", regenerate);
    const seen = dialogue.messages.slice(0, index).some(({ images }) => images?.length);
    if (message.text && seen && model?.heatmaps) tool("Heat map", (event) => heat(index, event.target));
    if (message.note) tools.append(element("span", { text: message.note }));
  }
  if (!(last && running && message.role === "assistant")) whole.append(tools);
  return whole;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    status.textContent = "Copied.";
  } catch {
    status.textContent = "This browser does not let the page copy; select the text instead.";
  }
}

async function submit() {
  const text = input.value.trim();
  if (running || !(text || pictures.length)) return;
  if (edited !== null) dialogue.messages.length = edited;
  dialogue.messages.push({ role: "user", text, images: pictures });
  dialogue.title ||= text.slice(0, 60) || "An image";
  leaveEditing();
  await write();
}

async function regenerate() {
  if (running) return;
  if (dialogue.messages.at(-1)?.role === "assistant") dialogue.messages.pop();
  await write();
}

// Asks for the answer to the dialogue's last question, and shows it as it comes.
async function write() {
  const current = dialogue, asked = toMessages(current.settings.system, current.messages);
  const reply = { role: "assistant", text: "", images: [] };
  current.messages.push(reply);
  running = new AbortController();
  controls();
  render();
  const whole = log.lastElementChild, text = element("div", { class: "text" });
  whole.append(text);
  whole.classList.add("writing");
  whole.setAttribute("aria-busy", "true");
  await save(current);
  const begun = performance.now();
  let first = null;
  try {
    const { finish, usage } = await answer(asked, sampling(current.settings), running.signal, (piece) => {
      first ??= performance.now();
      const below = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      reply.text += piece;
      text.append(piece);  // a text node: nothing in it is ever read as HTML
      if (below) log.scrollTop = log.scrollHeight;
    });
    const seconds = (performance.now() - (first ?? begun)) / 1000;
    const rate = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / seconds : 0;
    reply.note = `${usage.completion_tokens} tokens` + (rate ? `, ${rate.toFixed(rate < 10 ? 1 : 0)} a second` : "")
      + (finish === "length" ? "; cut at the limit" : "");
    if (!reply.text) reply.note += "; an empty answer";
  } catch (error) {
    if (error.name === "AbortError") reply.note = "stopped";
    else reply.wrong = error.message;
    if (error.status === 401) openParameters("key");
  }
  running = null;
  await save(current);
  controls();
  if (dialogue === current) render();
}

async function heat(index, button) {
  const before = dialogue.messages.slice(0, index), { text } = dialogue.messages[index];
  button.disabled = true;
  status.textContent = "Reading where the answer looked ...";
  try {
    const found = await heatmap(toMessages(dialogue.settings.system, before), text);
    status.textContent = "";
    await showHeat(find("#heat"), found, before.flatMap(({ images }) => images ?? []));
  } catch (error) {
    status.textContent = error.message;
  }
  button.disabled = false;
}

// -- the composer

function controls() {
  find("#send").hidden = running !== null;
  find("#stop").hidden = running === null;
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function edit(index) {
  if (running) return;
  const { text, images } = dialogue.messages[index];
  edited = index;
  input.value = text;
  pictures = [...(images ?? [])];
  find("#editing").hidden = false;
  showPictures();
  grow();
  input.focus();
}

function leaveEditing() {
  edited = null;
  pictures = [];
  input.value = "";
  find("#editing").hidden = true;
  showPictures();
  grow();
}

function showPictures() {
  find("#pictures").replaceChildren(...pictures.map((src, index) => element("li", {},
    element("img", { src, alt: `Image ${index + 1} to send` }),
    element("button", {
      type: "button", text: "×", "aria-label": `Remove image ${index + 1}`,
      onclick: () => { pictures.splice(index, 1); showPictures(); input.focus(); },
    }))));
}

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      status.textContent = `${file.name} is no image.`;
      continue;
    }
    try {
      pictures.push(await dataUrl(file));
      status.textContent = "";
    } catch {
      status.textContent = `${file.name || "The image"} cannot be read by this browser.`;
    }
  }
  showPictures();
  input.focus();
}

async function dataUrl(file) {
  const plain = ["image/png", "image/jpeg", "image/webp", "image/gif"].includes(file.type);
  let blob = file;
  const bitmap = await createImageBitmap(file);  // also shows whether it can be read
  if (!plain || file.size > LARGEST) {
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

// -- dialogues

async function save(which) {
  which.changed = Date.now();
  try {
    await keep(which);
  } catch {
    status.textContent = "This browser cannot keep the dialogue: its storage is full or off.";
  }
  await list();
}

async function list() {
  const known = await allDialogues().catch(() => []);
  nav.querySelector("ul").replaceChildren(...known.map((each) => element("li", {
    class: each.id === dialogue.id ? "current" : "",
  },
    element("button", { type: "button", text: each.title, onclick: () => open(each) }),
    element("button", {
      type: "button", class: "quiet", text: "×", "aria-label": `Delete ${each.title}`,
      onclick: () => remove(each),
    }))));
}

function open(which) {
  running?.abort();
  dialogue = which;
  leaveEditing();
  render();
  list();
  if (matchMedia("(max-width: 720px)").matches) toggleMenu(false);
  input.focus();
}

async function remove(which) {
  if (!confirm(`Delete "${which.title}"?`)) return;
  await forget(which.id);
  if (which.id === dialogue.id) open(fresh());
  else await list();
}

function toggleMenu(shown = nav.hidden) {
  nav.hidden = !shown;
  find("#menu").setAttribute("aria-expanded", shown);
}

// -- parameters

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

function sampling(settings) {
  const chosen = {};
  for (const name of NUMBERS) if (settings[name] !== undefined) chosen[name] = settings[name];
  if (settings.stop) chosen.stop = settings.stop;
  return chosen;
}

function openParameters(focus = "temperature") {
  const { elements } = parameters.querySelector("form");
  for (const name of [...NUMBERS, "system", "stop"]) elements[name].value = dialogue.settings[name] ?? "";
  elements.key.value = sessionStorage.getItem("key") ?? "";
  parameters.showModal();
  elements[focus].focus();
}

function takeParameters() {
  const { elements } = parameters.querySelector("form");
  const settings = {};
  for (const name of NUMBERS) if (elements[name].value !== "") settings[name] = elements[name].valueAsNumber;
  for (const name of ["system", "stop"]) if (elements[name].value) settings[name] = elements[name].value;
  dialogue.settings = settings;
  localStorage.setItem("settings", JSON.stringify(settings));
  if (dialogue.messages.length) save(dialogue);
  sessionStorage.setItem("key", elements.key.value.trim());
  if (!model) greet();
}

function turnTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
}

async function greet() {
  try {
    model = await theModel();
    find("#model").textContent = document.title = model.id;
    status.textContent = "";
    render();
  } catch (error) {
    status.textContent = error.message;
    if (error.status === 401) openParameters("key");
  }
}

// -- what a person does

find("#composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
find("#stop").addEventListener("click", () => running?.abort());
find("#new").addEventListener("click", () => open(fresh()));
find("#menu").addEventListener("click", () => toggleMenu());
find("#theme").addEventListener("click", turnTheme);
find("#options").addEventListener("click", () => openParameters());
find("#editing button").addEventListener("click", leaveEditing);
find("#files").addEventListener("change", (event) => { addFiles([...event.target.files]); event.target.value = ""; });
parameters.addEventListener("close", takeParameters);
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
  if (event.key === "Escape" && edited !== null) leaveEditing();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); open(fresh()); }
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) { event.preventDefault(); addFiles(files); }
});
let over = 0;
const dropping = (change) => { over = Math.max(0, over + change); find("#drop").hidden = !over; };
document.addEventListener("dragenter", () => dropping(1));
document.addEventListener("dragleave", () => dropping(-1));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dropping(-over);
  addFiles([...event.dataTransfer.files]);
});

document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
render();
list();
await greet();
input.focus();
