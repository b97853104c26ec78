// The page: dialogues, the composer, and what the model answers, shown as text and never as HTML.

import { allDialogues, dropPart, forget, keep, keepPart, newId, read, whenOthersChange } from "./store.js";
import { NUMBERS, answer, dataUrl, heatmap, theModel, toMessages } from "./service.js";
import { show as showHeat } from "./heat.js";

const find = (selector) => document.querySelector(selector);
const log = find("#log"), input = find("#ask"), status = find("#status");
const parameters = find("#parameters"), nav = find("#dialogues");
const nothing = () => ({ text: "", images: [] });

let model = null;
let dialogue = fresh();
let opening = 0;  // counts what was opened, so that the last wins
let pictures = [];  // data URLs, to be sent with the next question
let reading = null;  // while images are read: a promise of whether all could be
let edited = null;  // which message is being edited
let draft = nothing();  // what the composer held before
let running = null;  // aborts the answer that comes
let ended = Promise.resolve();  // fulfilled once that answer is kept

function fresh() {
  const settings = JSON.parse(localStorage.getItem("settings") ?? "{}");
  return { id: newId(), title: "", changed: 0, settings, messages: [] };
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

const textBox = (text = "") => element("div", { class: "text", dir: "auto", text });

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
  if (message.text) whole.append(textBox(message.text));
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
  if (running) return;
  const asked = dialogue, images = pictures;
  let all = true;
  while (reading) all = await reading;
  const text = input.value.trim();
  if (!all || running || !(text || pictures.length)) return;
  if (dialogue !== asked || pictures !== images) {
    status.textContent = "Not sent, as another dialogue or question was opened meanwhile.";
    return;
  }
  if (edited !== null) dialogue.messages.length = edited;
  dialogue.messages.push({ role: "user", text, images });
  dialogue.title ||= text.slice(0, 60) || "An image";
  leaveEditing();
  await write();
}

async function regenerate() {
  if (running) return;
  if (dialogue.messages.at(-1)?.role === "assistant") dialogue.messages.pop();
  await write();
}

const write = () => (ended = writeAnswer());

function stop() {
  running?.abort();
  return ended;
}

// Asks for the answer to the dialogue's last question, and shows it as it comes.
async function writeAnswer() {
  const current = dialogue, asked = toMessages(current.settings.system, current.messages);
  const reply = { role: "assistant", text: "", images: [] };
  current.messages.push(reply);
  running = new AbortController();
  controls();
  render();
  const whole = log.lastElementChild, text = textBox();
  whole.append(text);
  whole.classList.add("writing");
  whole.setAttribute("aria-busy", "true");
  await save(current);
  const { id } = current, keepShown = () => keepPart(id, reply.text);
  const timer = setInterval(keepShown, 1000);
  addEventListener("pagehide", keepShown);
  const begun = performance.now();
  let first = null;
  try {
    keepShown();  // in place of an earlier answer's
    const { finish, usage } = await answer(asked, current.settings, running.signal, (piece) => {
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
  clearInterval(timer);
  removeEventListener("pagehide", keepShown);
  await save(current);
  dropPart(id);
  running = null;
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

function compose({ text, images }, index = null) {
  edited = index;
  input.value = text;
  pictures = images;
  find("#editing").hidden = index === null;
  showPictures();
  grow();
}

function edit(index) {
  if (running) return;
  if (edited === null) draft = { text: input.value, images: pictures };
  const { text, images } = dialogue.messages[index];
  compose({ text, images: [...(images ?? [])] }, index);
  input.focus();
}

// Empties the composer; after an edit, gives back what it held before.
function leaveEditing() {
  compose(draft);
  draft = nothing();
}

function showPictures() {
  find("#pictures").replaceChildren(...pictures.map((src, index) => element("li", {},
    element("img", { src, alt: `Image ${index + 1} to send` }),
    element("button", {
      type: "button", text: "×", "aria-label": `Remove image ${index + 1}`,
      onclick: () => { pictures.splice(index, 1); showPictures(); input.focus(); },
    }))));
}

function addFiles(files) {
  const mine = readImages(files, pictures, reading);
  reading = mine;
  mine.then(() => { if (reading === mine) reading = null; });
}

// Adds to `images`, which by the end another question may have replaced in the composer.
async function readImages(files, images, earlier) {
  const before = await earlier ?? true;  // one after another, so that they stay in order
  const wrong = [];
  status.textContent = "Reading the image…";
  for (const file of files) {
    try {
      if (file.type.startsWith("image/")) images.push(await dataUrl(file));
      else wrong.push(`${file.name} is no image.`);
    } catch {
      wrong.push(`${file.name || "The image"} cannot be read by this browser.`);
    }
  }
  status.textContent = wrong.join(" ");
  showPictures();
  input.focus();
  return before && !wrong.length;
}

// -- dialogues

const TOLD = {
  copied: "Another tab went on with this dialogue: this one is now a copy.",
  deleted: "This dialogue was deleted, and is no longer kept.",
};

async function save(which) {
  try {
    const outcome = await keep(which);
    if (outcome !== "kept") status.textContent = TOLD[outcome];
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
    element("button", { type: "button", dir: "auto", text: each.title, onclick: () => open(each.id) }),
    element("button", {
      type: "button", class: "quiet", text: "×", "aria-label": `Delete ${each.title}`,
      onclick: () => remove(each),
    }))));
}

// Stops the answer that comes, and shows the dialogue of this id, or a new one.
async function open(id) {
  const turn = ++opening;
  if (id !== dialogue.id) {
    let found;
    do {
      await stop();  // it may be the one that is opened
      found = id ? await read(id) : fresh();
    } while (running);  // a question was sent meanwhile
    if (turn !== opening) return;
    if (found) {
      dialogue = found;
      if (edited !== null) leaveEditing();
      render();
    } else status.textContent = "This dialogue was deleted.";
    list();
  }
  if (matchMedia("(max-width: 720px)").matches) toggleMenu(false);
  input.focus();
}

async function remove(which) {
  if (!confirm(`Delete "${which.title}"?`)) return;
  if (which.id === dialogue.id) await open();
  await forget(which.id);
  await list();
}

function toggleMenu(shown = nav.hidden) {
  nav.hidden = !shown;
  find("#menu").setAttribute("aria-expanded", shown);
}

// -- parameters

function openParameters(focus = "temperature") {
  const { elements } = parameters.querySelector("form");
  for (const name of [...NUMBERS, "system", "stop"]) elements[name].value = dialogue.settings[name] ?? "";
  elements.key.value = sessionStorage.getItem("key") ?? "";
  parameters.returnValue = "";
  parameters.showModal();
  elements[focus].focus();
}

function takeParameters() {
  if (parameters.returnValue !== "done") return;  // Escape
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
find("#stop").addEventListener("click", stop);
find("#new").addEventListener("click", () => open());
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
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  if (event.key.toLowerCase() === "o" && event.ctrlKey && event.shiftKey) { event.preventDefault(); open(); }
});
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) { event.preventDefault(); addFiles(files); }
});
let over = 0;
const dropping = (change) => { over = Math.max(0, over + change); find("#drop").hidden = !over; };
const onFiles = (name, act) => document.addEventListener(name, (event) => {
  if (event.dataTransfer.types.includes("Files")) act(event);  // the browser itself drops text
});
onFiles("dragenter", () => dropping(1));
onFiles("dragleave", () => dropping(-1));
onFiles("dragover", (event) => event.preventDefault());
onFiles("drop", (event) => {
  event.preventDefault();
  dropping(-over);
  addFiles([...event.dataTransfer.files]);
});
whenOthersChange(list);

document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
render();
list();
await greet();
input.focus();
