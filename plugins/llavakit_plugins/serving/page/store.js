// Dialogues, kept in this browser alone (IndexedDB).
// A dialogue: { id, title, changed, settings, messages: [{ role, text, images: [data URL], note }] }

let opened = null;

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
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export async function allDialogues() {
  const found = await within("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.changed - a.changed);
}

export const keep = (dialogue) => within("readwrite", (store) => store.put(dialogue));
export const forget = (id) => within("readwrite", (store) => store.delete(id));
