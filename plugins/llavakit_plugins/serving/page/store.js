// Dialogues, kept in this browser alone (IndexedDB), for all its tabs.
// A dialogue: { id, title, changed, settings, messages: [{ role, text, images: [data URL], note, wrong }] }
// `changed` also tells the states of a dialogue apart: it grows with each that is kept.

let opened = null;
const tabs = new BroadcastChannel("llavakit");

export const newId = () => crypto.randomUUID?.() ?? String(Math.random());
export const whenOthersChange = (act) => tabs.addEventListener("message", act);

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("llavakit", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("dialogues", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function within(mode, use) {
  const transaction = (await database()).transaction("dialogues", mode);
  const request = use(transaction.objectStore("dialogues"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => {
      if (mode === "readwrite") tabs.postMessage("changed");
      resolve(request.result);
    };
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export async function allDialogues() {
  const found = await within("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

// Returns a dialogue, or undefined where it was deleted.
export async function read(id) {
  const dialogue = await within("readonly", (store) => store.get(id));
  const last = dialogue?.messages.at(-1);
  if (last?.role === "assistant" && !last.note && !last.wrong) {  // its page went before its end
    last.text ||= localStorage.getItem(partOf(id)) ?? "";
    last.note = "interrupted";
  }
  return dialogue;
}

// Keeps a dialogue and returns "kept"; or "copied", under a new id, where another tab has kept
// another state of it since it was read; or "deleted", and keeps nothing, where it was deleted.
export async function keep(dialogue) {
  const { id, title, changed } = dialogue;
  let outcome = "kept";
  const use = (store) => {
    const request = store.get(dialogue.id);
    request.onsuccess = () => {
      const stored = request.result;
      if (!stored && dialogue.changed) {
        outcome = "deleted";
        return;
      }
      if (stored && stored.changed !== dialogue.changed) {
        outcome = "copied";
        dialogue.id = newId();
        dialogue.title += " (copy)";
      }
      dialogue.changed = Math.max(Date.now(), dialogue.changed + 1);
      store.put(dialogue);
    };
    return request;
  };
  try {
    await within("readwrite", use);
  } catch (error) {
    Object.assign(dialogue, { id, title, changed });  // of what is still stored
    throw error;
  }
  return outcome;
}

export async function forget(id) {
  await within("readwrite", (store) => store.delete(id));
  dropPart(id);
}

// The part of an answer that has come: not in IndexedDB, as a page that closes cannot wait for it.
const partOf = (id) => `part of ${id}`;
export const keepPart = (id, text) => localStorage.setItem(partOf(id), text);
export const dropPart = (id) => localStorage.removeItem(partOf(id));
